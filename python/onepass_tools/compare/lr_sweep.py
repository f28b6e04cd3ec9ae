"""The sweep over learning rates, and the figures of its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.stats import interval
from onepass_tools.compare.tasks import Task
from onepass_tools.compare.training_runs import Result, train

NEAR = 0.1  # a loss is near the best loss if it is at most this many nats above it


def sweep(
    task: Task, exponents: list[float], sweep_seeds: int, seeds: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Trains with every algorithm at every rate ``algorithm.rates[task.name] * 10 ** exponent``.

    The best rate has the lowest mean validation loss over ``sweep_seeds`` seeds. Three settings are
    run again with ``seeds`` seeds: the best rate, the rate that reaches the target in the fewest
    steps, and AdamW at its best rate without warm-up.

    Args:
        task: the task.
        exponents: powers of ten, relative to the centre of each algorithm's sweep.
        sweep_seeds: the number of seeds in the sweep.
        seeds: the number of seeds of the repeated runs.
        tick: called after each group of runs.
    """
    rows: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        rates = [algorithm.rates[task.name] * 10**exponent for exponent in exponents]
        runs = []
        for lr in rates:
            runs.append([train(task, algorithm, lr, seed) for seed in range(sweep_seeds)])
            tick()
        means = [mean_loss(run, "validation") for run in runs]
        best = means.index(min(means))
        sharp = [train(task, algorithm, rates[best], seed, sharp=True) for seed in range(seeds)]
        tick()
        # The rate with the lowest validation loss is not always the fastest rate.
        speeds = [mean_steps(run) for run in runs]
        fast = speeds.index(min(speeds))
        quick = sharp
        if fast != best:
            quick = [train(task, algorithm, rates[fast], seed) for seed in range(seeds)]
        tick()
        trains = [mean_loss(run, "train") for run in runs]
        rows[algorithm.key] = {
            "rates": rates,
            "train by rate": [[r.train for r in run] for run in runs],
            "validation by rate": [[r.validation for r in run] for run in runs],
            "best": best,
            "at the edge": best in (0, len(rates) - 1),
            "lr": rates[best],
            "train": [r.train for r in sharp],
            "validation": [r.validation for r in sharp],
            "gap": [r.validation - r.train for r in sharp],
            "fast lr": rates[fast],
            "reached": [r.reached for r in quick],
            "state bytes": sharp[0].state_bytes,
            "sharpness": [r.sharpness for r in sharp],
            "decades": decades(trains, exponents),
            "curve": [
                statistics.fmean(values) for values in zip(*(r.curve for r in sharp), strict=False)
            ],
        }
    lr = rows["adamw"]["lr"]
    cold = [train(task, BY_KEY["adamw"], lr, seed, warmup_steps=0) for seed in range(seeds)]
    tick()
    return {
        "about": task.about,
        "steps": task.steps,
        "target": task.target,
        "unit": task.unit,
        "seeds": seeds,
        "sweep seeds": sweep_seeds,
        "rows": rows,
        "adamw without warm-up": {
            "train": [r.train for r in cold],
            "validation": [r.validation for r in cold],
            "gap": [r.validation - r.train for r in cold],
        },
    }


def mean_loss(runs: list[Result], which: str) -> float:
    """The mean loss over seeds; infinite if one run diverged."""
    values = [getattr(run, which) for run in runs]
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def mean_steps(runs: list[Result]) -> float:
    """The mean number of steps to the target over seeds; infinite if one run did not reach it."""
    steps = [run.reached for run in runs]
    return math.inf if None in steps else statistics.fmean(s for s in steps if s is not None)


def decades(losses: list[float], exponents: list[float]) -> float:
    """The width, in decades, of the swept rates that end within NEAR of the best training loss.

    Each rate counts for the interval halfway to its neighbours.
    """
    width = (exponents[-1] - exponents[0]) / max(1, len(exponents) - 1)
    return width * sum(loss <= min(losses) + NEAR for loss in losses)


def steps_to_target(reached: list[int | None]) -> str:
    """The text "mean ± interval", with the number of successful seeds if it is not all of them."""
    there = [step for step in reached if step is not None]
    if not there:
        return "not reached"
    mean, half = interval(there)
    text = f"{mean:.0f}" + ("" if math.isnan(half) else f" ± {half:.0f}")
    return text if len(there) == len(reached) else f"{text} ({len(there)} of {len(reached)} seeds)"
