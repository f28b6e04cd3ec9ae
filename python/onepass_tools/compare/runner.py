"""Runs the whole comparison: measurements, plots and report."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onepass_tools import UsageError
from onepass_tools.compare import line_fit, path_plots, plots, report, tasks
from onepass_tools.compare.algorithms import ALGORITHMS
from onepass_tools.compare.claims import measure_claims
from onepass_tools.compare.lr_sweep import sweep
from onepass_tools.compare.surfaces import STEPS, SURFACES, best_path
from onepass_tools.device_names import device_name


@dataclass(frozen=True)
class Size:
    """The size of a comparison.

    Attributes:
        steps: the number of training steps of the small models.
        exponents: the rates of a sweep, as powers of ten relative to its centre.
        sweep_seeds: the number of seeds in the sweep.
        seeds: the number of seeds of the runs at the best rate.
        path_steps: the number of steps of the paths over surfaces.
        animated: whether to write the animation.
    """

    steps: int
    exponents: list[float]
    sweep_seeds: int
    seeds: int
    path_steps: int = STEPS
    animated: bool = True


FULL = Size(300, [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], 2, 6)
QUICK = Size(120, [-0.5, 0.0, 0.5], 1, 2)


def run(args: argparse.Namespace) -> int:
    """Run the comparison with checked arguments; return the exit code."""
    size = QUICK if args.quick else FULL
    command = "onepass compare" + (" --quick" if args.quick else "")
    command += f" --seeds {args.seeds}" if args.seeds else ""
    with one_thread():
        compare(args.out, size, args.seeds or size.seeds, command, args.quiet)
    return 0


class Progress:
    """The progress on stderr: a bar on a terminal, else a line at most every ten seconds.

    Args:
        total: the number of turns.
        quiet: print nothing.
    """

    SECONDS = 10.0

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done = total, 0
        self._lines = not quiet and not sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if not quiet and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="compare")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self) -> None:
        """Counts one turn as finished."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        now = time.monotonic()
        if self._lines and (now - self._last >= self.SECONDS or self._done == self._total):
            self._last = now
            print(
                f"compare: {self._done} of {self._total} turns, {now - self._start:.0f} s",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread in the block.

    The models are too small for more threads, and one thread gives the same bits on every machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(out: Path, size: Size, seeds: int, command: str, quiet: bool) -> dict[str, Any]:
    """Measures, draws and writes everything to the folder ``out``; returns the results."""
    began = time.perf_counter()
    turns = 2 * (len(ALGORITHMS) * (len(size.exponents) + 2) + 1) + len(SURFACES) + 2
    with Progress(turns, quiet) as bar:
        experiment, batches = line_fit.run_algorithms(), line_fit.run_batches()
        bar.update()
        tracks: path_plots.Tracks = {}
        for surface in SURFACES:
            found = {a.key: best_path(surface, a, size.path_steps) for a in ALGORITHMS}
            tracks[surface.key] = found
            bar.update()
        claims = measure_claims(experiment)
        bar.update()
        swept = {
            task.name: sweep(task, size.exponents, size.sweep_seeds, seeds, bar.update)
            for task in (tasks.cnn_task(size.steps), tasks.transformer_task(size.steps))
        }
    results = {
        "about": {
            "command": command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(torch.device("cpu")),
            "torch": str(torch.__version__),
            "commit": _commit(),
            "seconds": 0.0,
        },
        "line": experiment,
        "batches": batches,
        "paths": {
            name: {k: {"lr": t.lr, "last": float(t.losses[-1])} for k, t in found.items()}
            for name, found in tracks.items()
        },
        "claims": claims,
        "tasks": swept,
    }
    try:
        _draw(out, results, tracks, size.animated)
        results["about"]["seconds"] = time.perf_counter() - began
        report.write(out, results)
    except OSError as error:  # for example a full disk or a removed directory
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    print(f"wrote {out / 'comparison.md'} and its pictures ({results['about']['seconds']:.0f} s)")
    return results


def _draw(out: Path, results: dict[str, Any], tracks: path_plots.Tracks, animated: bool) -> None:
    plots.draw_line(out / "line.png", results["line"])
    plots.draw_batches(out / "batches.png", results["batches"])
    plots.draw_models(out / "models.png", results["tasks"])
    path_plots.draw_paths(out / "paths.png", tracks)
    for algorithm, name in zip(ALGORITHMS, path_plots.files(), strict=True):
        path_plots.draw_algorithm(out / name, algorithm.key, tracks)
    if animated:
        path_plots.animate(out / "paths.gif", tracks)


def _commit() -> str:
    """The commit of the sources; "unknown" if they are not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
