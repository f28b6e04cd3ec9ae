"""Command-line options that several benchmarks share: device, samples and output file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from onepass_tools.benchmark.devices import DEVICES, Device

from . import results
from .results import Line


def parser_of(
    kind: str, about: str | None, samples: int | None = None, each: str | None = None
) -> argparse.ArgumentParser:
    """A parser with --device, --out, --no-write and, for most commands, --samples.

    Args:
        kind: the command is ``python -m bench.<kind>``, its file bench/results/<kind>.jsonl.
        about: the description that --help prints.
        samples: the default of --samples.
        each: the help text of --samples; None for a command without --samples.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{kind}", description=about)
    parser.add_argument(
        "--device", choices=list(DEVICES), default="cpu", help="device to measure (default cpu)"
    )
    if each is not None:
        parser.add_argument("--samples", type=int, default=samples, metavar="N", help=each)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"append result lines to FILE (default bench/results/{kind}.jsonl)",
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    return parser


def device_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *counts: str
) -> Device | None:
    """The device that --device selects; None, with a message on stderr, if it is missing.

    Exits with code 2 if --samples or one of the options named in ``counts`` is below 1.
    """
    for name in ("samples", *counts):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    device = DEVICES[args.device]
    if why := device.unavailable():
        print(f"{parser.prog.removeprefix('python -m ')}: {why}", file=sys.stderr)
        return None
    return device


def keep(args: argparse.Namespace, kind: str, lines: Iterable[Line]) -> None:
    """Appends lines to the file that --out selects; does nothing with --no-write."""
    if not args.no_write:
        results.append(args.out or results.ROOT / "bench" / "results" / f"{kind}.jsonl", lines)
