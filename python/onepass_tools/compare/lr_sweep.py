"""The sweep over learning rates and the table that is made of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.stats import interval
from onepass_tools.compare.tasks import Task
from onepass_tools.compare.training_runs import Result, train

NEAR = 0.1  # nats above the best that still count as near it


def sweep(
    task: Task, exponents: list[float], sweep_seeds: int, seeds: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Every algorithm at every rate: ``rates[algorithm.key] * 10 ** exponent``, and its best.

    The best rate is that of the lowest validation loss, mean over ``sweep_seeds``; it is run again
    with ``seeds``, as are the rate that reaches the target soonest, and AdamW without warm-up.
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
        # The rate that generalises best need not be the one that is quick.
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
    """Over seeds; infinite if one of them diverged."""
    values = [getattr(run, which) for run in runs]
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def mean_steps(runs: list[Result]) -> float:
    """To the target, over seeds; infinite if one of them did not reach it."""
    steps = [run.reached for run in runs]
    return math.inf if None in steps else statistics.fmean(s for s in steps if s is not None)


def decades(losses: list[float], exponents: list[float]) -> float:
    """How many decades of the rate, out of those swept, end within 0.1 of the best training loss.

    A rate stands for the half of the way to its neighbours.
    """
    width = (exponents[-1] - exponents[0]) / max(1, len(exponents) - 1)
    return width * sum(loss <= min(losses) + NEAR for loss in losses)


def steps_to_target(reached: list[int | None]) -> str:
    """Mean ± interval; how many seeds got there, if not all."""
    there = [step for step in reached if step is not None]
    if not there:
        return "not reached"
    mean, half = interval(there)
    text = f"{mean:.0f}" + ("" if math.isnan(half) else f" ± {half:.0f}")
    return text if len(there) == len(reached) else f"{text} ({len(there)} of {len(reached)} seeds)"
