"""Adagrad.

Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic
optimization" (2011).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ..numerics.arrays import F32, States
from .base import (
    DECOUPLED_DECAY,
    LR,
    OWN,
    Benchmark,
    BitsAndBytes,
    Flag,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    decay,
    present,
)
from .option_checks import check_flag, check_number


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Adagrad (Duchi, Hazan, Singer 2011)."""
    lr, weight_decay, eps = h
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    sum_ = present(states[0]) + grad * grad
    denom = np.sqrt(sum_ + eps) if "eps_in_sqrt" in flags else np.sqrt(sum_) + eps
    delta = lr * (grad / denom)
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (sum_,)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns (lr decayed by ``lr_decay``, weight decay, eps)."""
    eps, lr_decay = o[OWN : OWN + 2]
    lr = o[LR] / (1.0 + (step.number - 1) * lr_decay)
    return lr, decay(o, lr), eps


def own(group: Group) -> tuple[float, ...]:
    """Returns (eps, lr_decay)."""
    return float(group["eps"]), float(group["lr_decay"])


def check(group: Group) -> None:
    """Raises ValueError if an Adagrad option of a group is invalid."""
    check_number("eps", group["eps"])
    check_number("lr_decay", group["lr_decay"])
    check_number("initial_accumulator_value", group["initial_accumulator_value"])
    check_flag("eps_in_sqrt", group.get("eps_in_sqrt", False))


RULE = Rule(
    "adagrad",
    flags=(DECOUPLED_DECAY, Flag("eps_in_sqrt")),
    slots=(Slot("sum", "second", starts_at="initial_accumulator_value"),),
    own=own,
    derive=derive,
    scalars=3,
    update=update,
    check=check,
    needs_step=True,
    bitsandbytes=BitsAndBytes(("sum",), lacking={"lr_decay": 0, "eps_in_sqrt": False}),
    benchmark=Benchmark("adagrad", {"lr": 1e-2, "eps": 1e-10}),
)
