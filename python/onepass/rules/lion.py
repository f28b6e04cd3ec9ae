"""Lion.

Source: Chen et al., "Symbolic discovery of optimization algorithms" (2023), program 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ..numerics.arrays import F32, States
from .base import (
    CAUTIOUS_DECAY,
    DECOUPLED_DECAY,
    LR,
    OWN,
    Benchmark,
    BitsAndBytes,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    cautious,
    decay,
    present,
)
from .option_checks import check_betas


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Lion (Chen et al. 2023). sign(0) is 0. sign(NaN) is NaN, so the weight becomes NaN."""
    lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = h
    exp_avg = present(states[0])
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    blend = beta1 * exp_avg + one_minus_beta1 * grad
    sign = np.where(blend > 0, np.float32(1), np.where(blend < 0, np.float32(-1), blend))
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    delta = lr * sign
    if "cautious" in flags:
        delta = cautious(delta, weight_decay * param, param)
    elif "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg,)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns (lr, weight decay, beta1, 1 - beta1, beta2, 1 - beta2)."""
    beta1, beta2 = o[OWN : OWN + 2]
    return o[LR], decay(o, o[LR]), beta1, 1.0 - beta1, beta2, 1.0 - beta2


def own(group: Group) -> tuple[float, ...]:
    """Returns (beta1, beta2)."""
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2


def check(group: Group) -> None:
    """Raises ValueError if the betas of a group are invalid."""
    check_betas(group["betas"])


RULE = Rule(
    "lion",
    flags=(DECOUPLED_DECAY, CAUTIOUS_DECAY),
    slots=(Slot("exp_avg", "first"),),
    own=own,
    derive=derive,
    scalars=6,
    update=update,
    check=check,
    bitsandbytes=BitsAndBytes(
        ("exp_avg",),
        betas="betas",
        decoupled=True,
        lacking={"cautious_weight_decay": False},
    ),
    benchmark=Benchmark("lion", {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-2}),
)
