"""``python -m bench.momentum_loss``: the loss of Muon with each format of the momentum.

The model of the demo is trained from several seeds. A format that onepass does not have is
simulated: after every step the fp32 momentum is replaced by its encoded and decoded value, which is
what a step with such a state leaves. Each finished run appends a line to
bench/results/momentum_loss.jsonl; ``--report`` prints the losses of all lines.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

import onepass
from onepass_tools.demo.data import Corpus, load
from onepass_tools.demo.model import Shape, initial_weights
from onepass_tools.demo.recipes import muon_groups
from onepass_tools.demo.train import MAX_GRAD_NORM, backward, schedule, validate

from . import results
from .momentum_formats import CODES
from .results import Line
from .runs import Run, add_arguments, check_arguments, run_missing
from .training import Size, task_of

OUT = results.ROOT / "bench" / "results" / "momentum_loss.jsonl"
NATIVE = ("fp32", "bf16")
FORMATS = (
    *NATIVE,
    "linear8 nearest, blocks of 32, bf16",
    "linear8 nearest, blocks of 16, power of 2^(1/8)",
)
FULL = Size(Shape(64, 96, 2, 4), 8, 150, 16, 4_000_000, 0)
QUICK = Size(Shape(16, 16, 1, 2), 4, 6, 2, 400_000, 0)
LR, DECAY = 0.02, 0.1


def train(name: str, size: Size, seed: int, corpus: Corpus) -> Line:
    """Trains one run; returns its validation loss."""
    began = time.perf_counter()
    task = task_of(size, seed, corpus, initial_weights(size.shape, seed))
    model = task.model()
    options: dict[str, Any] = {"states": name if name in NATIVE else "fp32", "seed": seed}
    optimizer = onepass.Muon(muon_groups(model, DECAY), LR, **options)
    scheduler = schedule(optimizer, size.steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(size.steps):
        losses.append(float(backward(task, model, step)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if name not in NATIVE:
            for param in optimizer.param_groups[0]["params"]:
                momentum = optimizer.state[param]["momentum_buffer"]
                momentum.copy_(CODES[name].run(momentum, generator))
    tail = losses[-max(1, size.steps // 10) :]
    return {
        "validation_loss": validate(task, model),
        "train_loss": sum(tail) / len(tail),
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(lines: list[Line]) -> str:
    """The validation losses of each format, and their distance from those of fp32, in Markdown."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        losses = found.setdefault(line["settings"]["format"], {})
        losses[line["seed"]] = line["validation_loss"]
    rows = [
        "| stored momentum | mean loss | standard deviation | minus fp32 of the same seed, mean "
        "(smallest to largest) |",
        "|---|---:|---:|---:|",
    ]
    for name, losses in found.items():
        values = list(losses.values())
        paired = [loss - found["fp32"][seed] for seed, loss in losses.items()]
        cells = [name, f"{statistics.mean(values):.4f}", f"{statistics.stdev(values):.4f}"]
        apart = f"{min(paired):+.4f} to {max(paired):+.4f}"
        rows.append(f"| {' | '.join(cells)} | {statistics.mean(paired):+.4f} ({apart}) |")
    last, seeds = lines[-1], {seed for losses in found.values() for seed in losses}
    shape = last["settings"]["shape"]
    text = (
        f"Measured by `python -m bench.momentum_loss` on a CPU ({last['date'][:10]}, commit "
        f"{str(last['commit'])[:7]}): the model of the demo with width {shape['width']} and depth "
        f"{shape['depth']}, {last['settings']['steps']} steps, {len(seeds)} seeds."
    )
    return "\n".join([*rows, "", text])


def main(argv: list[str] | None = None) -> int:
    """Trains the missing runs, or prints the losses."""
    parser = argparse.ArgumentParser(prog="python -m bench.momentum_loss", description=__doc__)
    parser.add_argument("--report", action="store_true", help="print the losses and stop")
    add_arguments(parser, "--formats", FORMATS, OUT, seeds=5)
    args = parser.parse_args(argv)
    if args.report:
        print(table(results.read_lines(args.out)))
        return 0
    check_arguments(parser, args)
    size = QUICK if args.quick else FULL
    corpus = load(size.corpus_bytes)

    def run(name: str) -> Run:
        options = {"lr": LR, "weight_decay": DECAY, "max_grad_norm": MAX_GRAD_NORM}
        settings = {"format": name, **options, **asdict(size)}
        return Run(name, settings, lambda seed: train(name, size, seed, corpus))

    shown = "train loss {train_loss:.4f}"
    run_missing(args, "momentum_loss", [run(n) for n in FORMATS], lambda x: shown.format(**x))
    return 0


if __name__ == "__main__":
    sys.exit(main())
