"""`onepass compare`: plots and measurements of the algorithms on small problems."""

from __future__ import annotations

import argparse
from pathlib import Path

from onepass_tools import UsageError
from onepass_tools.checks import check_extra, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass compare`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("compare-out"),
        metavar="DIR",
        help="output folder (default: compare-out)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="runs at the best learning rate (default: 6; 2 with --quick)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer steps and learning rates: under two minutes on two cores",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the files written")


def run(args: argparse.Namespace) -> int:
    """Run the comparison and return the exit code.

    Raises UsageError for an invalid option, an unwritable directory or a missing package.
    """
    if args.seeds is not None and args.seeds < 2:
        raise UsageError(
            f"--seeds must be at least 2, to compute confidence intervals; got {args.seeds}"
        )
    check_extra()
    check_out(args.out)

    from onepass_tools.compare import runner

    return runner.run(args)
