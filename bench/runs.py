"""Training runs that are kept in a file of result lines: what is there already is left out."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import results
from .results import Line


@dataclass(frozen=True)
class Run:
    """One thing to train, with any seed.

    Attributes:
        name: as it is printed.
        settings: all that the run depends on but the seed; they go into its line.
        train: a seed -> the rest of the line, "validation_loss" and "seconds" in it.
    """

    name: str
    settings: Mapping[str, Any]
    train: Callable[[int], Line]


def add_arguments(
    parser: argparse.ArgumentParser, option: str, names: Sequence[str], out: Path, seeds: int
) -> None:
    """Declares which runs, which seeds, and the file.

    Args:
        parser: changed.
        option: what the runs are called, for instance "--configs".
        names: of all runs.
        out, seeds: the defaults.
    """
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help=f"so many (default {seeds})"
    )
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="(default 0)")
    parser.add_argument(
        option, dest="names", metavar="NAME", nargs="+", choices=names, help=str(list(names))
    )
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="lines are kept here")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with exit code 2 where arguments do not go together."""
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {args.seeds}")
    if args.quick and args.out == parser.get_default("out"):
        parser.error("--quick is for trying things out: name another file with --out")


def run_missing(
    args: argparse.Namespace, kind: str, runs: Sequence[Run], shown: Callable[[Line], str]
) -> None:
    """Trains what the file has no line of, on one thread, and appends a line after each run.

    Args:
        args: of :func:`add_arguments`.
        kind: of the lines.
        runs: all there are; those that the arguments name are run.
        shown: what is printed of a line, beside seed, name, loss and time.
    """
    env = results.environment() | {"python": platform.python_version()}
    known = {run_key(line) for line in results.read_lines(args.out) if "validation_loss" in line}
    threads = torch.get_num_threads()
    # One core: sums come in one order, and a small model gains nothing from more.
    torch.set_num_threads(1)
    try:
        # Seed by seed, so that what an interrupted run leaves can be compared.
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for run in runs:
                # As settings come back from a file: JSON has no tuples.
                settings = json.loads(json.dumps(dict(run.settings)))
                start = {**env, "settings": settings, "seed": seed}
                if (args.names and run.name not in args.names) or run_key(start) in known:
                    continue
                found = run.train(seed)
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                results.append(args.out, [{**start, "kind": kind, **found, "date": now}])
                print(
                    f"seed {seed}  {run.name:<36} loss {found['validation_loss']:.4f}  "
                    f"{shown(found)}  {found['seconds']:.0f} s",
                    flush=True,
                )
    finally:
        torch.set_num_threads(threads)


def run_key(line: Line) -> tuple[str, str, int]:
    """What tells runs apart: machine, settings, seed."""
    return line["device"], repr(sorted(line["settings"].items())), line["seed"]
