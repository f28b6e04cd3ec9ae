"""Training runs whose results are lines of a file; runs that already have a line are skipped."""

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
    """A training run, for any seed.

    Attributes:
        name: name for the output.
        settings: everything that the result depends on except the seed; stored in the result line.
        train: takes a seed, trains, and returns the measured fields of the line, including
            "validation_loss" and "seconds".
    """

    name: str
    settings: Mapping[str, Any]
    train: Callable[[int], Line]


def add_arguments(
    parser: argparse.ArgumentParser, option: str, names: Sequence[str], out: Path, seeds: int
) -> None:
    """Adds the options that select runs, seeds and the output file.

    Args:
        parser: the parser to extend.
        option: the option that selects runs by name, for example "--configs".
        names: names of all runs.
        out: default of --out.
        seeds: default of --seeds.
    """
    parser.add_argument("--quick", action="store_true", help="train a tiny model for a few steps")
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help=f"number of seeds (default {seeds})"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first seed (default 0)"
    )
    parser.add_argument(
        option,
        dest="names",
        metavar="NAME",
        nargs="+",
        choices=names,
        help=f"runs to train (default all): {list(names)}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        metavar="FILE",
        help=f"file of the result lines (default bench/results/{out.name})",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with exit code 2 if an argument is invalid."""
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {args.seeds}")
    if args.quick and args.out == parser.get_default("out"):
        parser.error(
            "--quick must not write to the default result file: select another file with --out"
        )


def run_missing(
    args: argparse.Namespace, kind: str, runs: Sequence[Run], shown: Callable[[Line], str]
) -> None:
    """Trains the runs without a line in the file, on one thread; appends a line after each run.

    Args:
        args: the arguments of :func:`add_arguments`.
        kind: kind of the result lines.
        runs: all runs, of which the arguments select some.
        shown: takes a line, and returns what is printed besides seed, name, loss and time.
    """
    env = results.environment() | {"python": platform.python_version()}
    known = {run_key(line) for line in results.read_lines(args.out) if "validation_loss" in line}
    threads = torch.get_num_threads()
    # One thread fixes the order of sums; a small model gains nothing from more threads.
    torch.set_num_threads(1)
    try:
        # All runs of one seed before the next seed, so that the lines of an interrupted call can be
        # compared.
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for run in runs:
                # The same types as settings that are read from a file: JSON has no tuples.
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
    """The key of a run: machine, settings, seed."""
    return line["device"], repr(sorted(line["settings"].items())), line["seed"]
