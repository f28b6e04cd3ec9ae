"""Learning rates over a run: a linear warm-up, then one of four shapes, by torch's schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from .validation import check_count, check_name, check_share

SCHEDULES = ("warm_restarts", "cosine", "constant", "wsd")
SCHEDULE_OPTIONS = ("total_steps", "final", "restart_steps", "restart_factor", "decay_steps")
"""Keywords of :func:`schedule` that the Trainer takes in ``schedule_options``."""


def schedule(
    optimizer: torch.optim.Optimizer,
    name: str = "warm_restarts",
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    final: float = 0.0,
    restart_steps: int = 50,
    restart_factor: int = 2,
    decay_steps: int | None = None,
) -> LRScheduler:
    r"""A scheduler to be stepped after each step of the optimizer, any optimizer.

    Steps count from 0. Warm-up takes :math:`\eta (k + 1) / (w + 1)` for the first w steps. Then

    - ``warm_restarts``: :class:`~torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`, whose first
      period has ``restart_steps`` steps and each further one ``restart_factor`` times as many
      (Loshchilov, Hutter, "SGDR", 2017);
    - ``cosine``: half a cosine from :math:`\eta` down to ``final`` :math:`\eta` at ``total_steps``;
    - ``constant``: :math:`\eta`;
    - ``wsd`` (warm-up, stable, decay): :math:`\eta`, and over the last ``decay_steps`` linearly to
      ``final`` :math:`\eta` (Hu et al., "MiniCPM", 2024).

    ``cosine`` and ``wsd`` stay at their end after ``total_steps``.

    Args:
        optimizer: its ``lr``, of each group, is :math:`\eta`, the highest of the run.
        name: one of :data:`SCHEDULES`.
        warmup_steps: w, in steps.
        total_steps: of the run, warm-up included; needed by ``cosine`` and ``wsd`` alone.
        final: the lowest rate as a share of :math:`\eta`, in [0, 1]; for ``warm_restarts`` of the
            first group's.
        restart_steps, restart_factor: of ``warm_restarts``.
        decay_steps: of ``wsd``; a fifth of ``total_steps`` unless given.

    Raises:
        ValueError: an unknown name, which lists the known ones; a number out of range.
        TypeError: a value that is not a number, or not an integer where steps are counted.
    """
    check_name("schedule", name, SCHEDULES)
    _check_steps(name, warmup_steps, total_steps, restart_steps, restart_factor, decay_steps)
    check_share("final", final)
    rest = (total_steps or 0) - warmup_steps
    if decay_steps is None:
        decay_steps = max(1, (total_steps or 0) // 5)
    if name == "wsd" and not 1 <= decay_steps <= rest:
        raise ValueError(f"decay_steps must be in [1, {rest}]; got {decay_steps}")

    if name == "warm_restarts":
        lowest = final * float(optimizer.param_groups[0]["lr"])
        body: LRScheduler = CosineAnnealingWarmRestarts(
            optimizer, restart_steps, restart_factor, lowest
        )
    else:
        body = LambdaLR(optimizer, _factor(name, rest, final, decay_steps))
    if not warmup_steps:
        return body
    warmup = LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, warmup_steps)
    return SequentialLR(optimizer, [warmup, body], [warmup_steps])


def _check_steps(
    name: str,
    warmup_steps: int,
    total_steps: int | None,
    restart_steps: int,
    restart_factor: int,
    decay_steps: int | None,
) -> None:
    """The checks of :func:`schedule` that concern counts of steps."""
    check_count("warmup_steps", warmup_steps, 0)
    if total_steps is not None:
        check_count("total_steps", total_steps, 1)
    check_count("restart_steps", restart_steps, 1)
    check_count("restart_factor", restart_factor, 1)
    if decay_steps is not None:
        check_count("decay_steps", decay_steps, 1)
    if name in ("cosine", "wsd") and (total_steps is None or total_steps <= warmup_steps):
        raise ValueError(
            f"schedule {name!r} needs total_steps above warmup_steps ({warmup_steps}); "
            f"got {total_steps}"
        )


def _factor(name: str, steps: int, final: float, decay_steps: int) -> Callable[[int], float]:
    """The share of the highest rate at a step after the warm-up.

    torch's CosineAnnealingLR would rise again after its end.
    """

    def cosine(step: int) -> float:
        done = min(1.0, step / steps)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    def wsd(step: int) -> float:
        done = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
        return 1 - (1 - final) * done

    return {"cosine": cosine, "wsd": wsd, "constant": lambda step: 1.0}[name]
