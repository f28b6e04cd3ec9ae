"""Runs the demo: model size, training runs, comparison with torch, and report."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from onepass_tools import EXIT_INTERRUPTED, UsageError, package_version
from onepass_tools.demo import report
from onepass_tools.demo.data import Batches, Corpus, load
from onepass_tools.demo.model import Shape, count_parameters, initial_weights
from onepass_tools.demo.recipes import Recipe, recipes
from onepass_tools.demo.train import (
    VALIDATIONS,
    Replay,
    Run,
    Task,
    as_dict,
    replay,
    seconds_per_step,
    train,
)
from onepass_tools.device_names import device_name

CALIBRATION_STEPS = 40
REPLAY_STEPS = 10
MAX_THREADS = 8


@dataclass(frozen=True)
class Size:
    """The size of a demo: `steps` per optimizer, or fewer to stay below `budget` seconds in all."""

    shape: Shape
    batch: int
    steps: int
    budget: float
    validation_batches: int
    corpus_bytes: int


QUICK = Size(Shape(32, 32, 2, 2), 8, 6, math.inf, 4, 400_000)
CPU = Size(Shape(96, 128, 3, 4), 8, 500, 130.0, 32, 8_000_000)
GPU = Size(Shape(256, 512, 8, 8), 64, 1500, 120.0, 16, 8_000_000)


def run(args: argparse.Namespace) -> int:
    """Run the demo with checked arguments; return the exit code."""
    device = _device(args.device)
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        # The model is too small for many threads. If another process uses a core, every parallel
        # loop waits for the thread on that core; on two cores this was 60 times slower.
        torch.set_num_threads(max(1, min(threads, MAX_THREADS, (os.cpu_count() or 1) - 1)))
    try:
        return _run(args, device)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    size = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    corpus = load(size.corpus_bytes)
    chosen = recipes(device)
    probe = _task(size, corpus, device, args.seed, CALIBRATION_STEPS)
    steps, reason = _steps(args.steps, size, probe, chosen)
    task = _task(size, corpus, device, args.seed, max(steps, REPLAY_STEPS))
    parameters = count_parameters(task.model())
    if not args.quiet:
        print(
            f"byte-level GPT, {parameters:,} parameters, context {size.shape.context}, batch "
            f"{size.batch}, on {device_name(device)}\n"
            f"text: {corpus.train.numel():,} bytes from {len(corpus.train_files)} files of the "
            f"standard library of Python {platform.python_version()}; validation on "
            f"{len(corpus.validation_files)} other files\n"
            f"{steps} steps for each of {len(chosen)} optimizers ({reason})\n",
            flush=True,
        )

    runs: list[Run] = []
    comparison: Replay | None = None
    interrupted = False
    try:
        for recipe in chosen:
            runs.append(train(task, recipe, steps, args.quiet))
        comparison = replay(task, chosen[0], chosen[1], REPLAY_STEPS)
    except KeyboardInterrupt:
        interrupted = True
        print(f"onepass: interrupted, {len(runs)} of {len(chosen)} runs done", file=sys.stderr)
    if runs:
        report.print_table(runs)
        report.print_deviation(runs, comparison)
        title = f"byte-level GPT, {parameters / 1e6:.2f} M parameters, {device_name(device)}"
        content: dict[str, object] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "onepass": package_version("onepass"),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
            },
            "device": device_name(device),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "config": {
                "seed": args.seed,
                "quick": args.quick,
                "steps": steps,
                "steps_chosen_by": reason,
                "parameters": parameters,
                "size": asdict(size),
                "train_bytes": corpus.train.numel(),
                "validation_bytes": corpus.validation.numel(),
                "validation_files": corpus.validation_files,
            },
            "interrupted": interrupted,
            "summary": [dict(zip(report.HEADINGS, row, strict=True)) for row in report.rows(runs)],
            "onepass_adamw_against_torch": {
                "max_training_loss_difference": report.deviation(runs),
                "replay": as_dict(comparison) if comparison else None,
            },
            "runs": [as_dict(finished) for finished in runs],
        }
        _write(args.out, runs, title, content)
    return EXIT_INTERRUPTED if interrupted else 0


def _write(out: Path, runs: list[Run], title: str, content: dict[str, object]) -> None:
    picture, numbers = out / "loss.png", out / "results.json"
    try:
        report.write_json(numbers, content)
        report.draw(picture, runs, title)
    except OSError as error:  # for example a full disk or a removed directory
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    print(f"\nwrote {picture}\nwrote {numbers}")


def _task(size: Size, corpus: Corpus, device: torch.device, seed: int, steps: int) -> Task:
    context = size.shape.context
    return Task(
        shape=size.shape,
        device=device,
        weights=initial_weights(size.shape, seed),
        train=Batches(corpus.train.to(device), steps, size.batch, context, seed),
        # Every seed has the same validation windows, so that seeds are comparable.
        validation=Batches(
            corpus.validation.to(device), size.validation_batches, size.batch, context, 0
        ),
    )


def _steps(asked: int | None, size: Size, probe: Task, chosen: list[Recipe]) -> tuple[int, str]:
    """Return the number of steps per optimizer, and the reason for this number."""
    if asked is not None:
        return asked, "set with --steps"
    if math.isinf(size.budget):
        return size.steps, "--quick"
    began = time.perf_counter()
    step, validation = seconds_per_step(probe, chosen[0])
    left = size.budget - (time.perf_counter() - began)
    fitting = int((left / len(chosen) - VALIDATIONS * validation) / step)
    if fitting >= size.steps:
        return size.steps, "the default"
    return max(50, fitting // 10 * 10), (
        f"not {size.steps}: at {1e3 * step:.0f} ms per step, this number fits into "
        f"{size.budget:.0f} s"
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda needs a GPU: torch finds no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
