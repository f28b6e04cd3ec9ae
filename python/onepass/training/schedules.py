"""Learning-rate schedules from torch's schedulers: a linear warm-up, then one of four shapes."""

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
    r"""Makes a scheduler for any optimizer. Call its ``step`` after each step of the optimizer.

    Steps k count from 0. In the first w steps, the warm-up, the learning rate is
    :math:`\eta (k + 1) / (w + 1)`. After the warm-up it depends on ``name``:

    - ``warm_restarts``: :class:`~torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`. The first
      period has ``restart_steps`` steps, and each period is ``restart_factor`` times as long as the
      previous one (Loshchilov, Hutter, "SGDR", 2017);
    - ``cosine``: half a cosine from :math:`\eta` down to ``final`` :math:`\eta` at ``total_steps``;
    - ``constant``: :math:`\eta`;
    - ``wsd`` (warm-up, stable, decay): :math:`\eta`, then a linear decay to ``final``
      :math:`\eta` over the last ``decay_steps`` steps (Hu et al., "MiniCPM", 2024).

    After ``total_steps``, the rate of ``cosine`` and ``wsd`` remains at its final value.

    Args:
        optimizer: the optimizer; the ``lr`` of each group is :math:`\eta`, the highest rate.
        name: one of :data:`SCHEDULES`.
        warmup_steps: w, the number of warm-up steps.
        total_steps: the number of steps, including warm-up; only ``cosine`` and ``wsd`` need it.
        final: the lowest rate as a fraction of :math:`\eta`, in [0, 1]; for ``warm_restarts``, as a
            fraction of the :math:`\eta` of the first group.
        restart_steps, restart_factor: for ``warm_restarts``, see above.
        decay_steps: for ``wsd``, see above; a fifth of ``total_steps`` by default.

    Raises:
        ValueError: the name is unknown (the message lists the names), or a number is out of range.
        TypeError: a value is not a number, or a number of steps is not an integer.
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
    """Checks the step counts of :func:`schedule`."""
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
    """Returns a function from the step after the warm-up to the fraction of the highest rate.

    CosineAnnealingLR is not used, because its rate rises again after the last step.
    """

    def cosine(step: int) -> float:
        done = min(1.0, step / steps)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    def wsd(step: int) -> float:
        done = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
        return 1 - (1 - final) * done

    return {"cosine": cosine, "wsd": wsd, "constant": lambda step: 1.0}[name]
