"""`onepass demo`: train a small byte-level GPT on Python's own source with several optimizers."""

from __future__ import annotations

import argparse
from pathlib import Path

from onepass_tools import UsageError
from onepass_tools.checks import check_extra, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass demo`."""
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps per optimizer (default on a CPU: 500, or fewer if all would take over 130 s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="output folder (default: demo-out)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the weights and the batches (default: 0)",
    )
    parser.add_argument("--quick", action="store_true", help="train a tiny model for a few steps")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to train on (default: auto, a GPU if there is one)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print only the table and the files written"
    )


def run(args: argparse.Namespace) -> int:
    """Check the options before minutes of work, then run the demo and return the exit code.

    Raises UsageError for an invalid option, an unwritable directory or a missing package.
    """
    if args.steps is not None and args.steps < 1:
        raise UsageError(f"--steps must be at least 1; got {args.steps}")
    check_extra()
    check_out(args.out)

    from onepass_tools.demo import runner

    return runner.run(args)
