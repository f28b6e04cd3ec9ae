"""RMSprop.

Source: Hinton, "Neural networks for machine learning", lecture 6e (2012); centered: Graves,
"Generating sequences with recurrent neural networks" (2013).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ..formats import STATE_FORMATS
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
from .group_options import option
from .option_checks import check_flag, check_fraction, check_number


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """RMSprop (Hinton 2012), centered (Graves 2013).

    A negative centered variance is set to 0. Rounding can make the variance negative, and the
    square root in torch.optim.RMSprop then returns NaN.
    """
    lr, weight_decay, alpha, one_minus_alpha, eps, momentum = h
    square_avg, momentum_buffer, grad_avg = present(states[0]), states[1], states[2]
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    square_avg = alpha * square_avg + one_minus_alpha * (grad * grad)
    variance = square_avg
    if "centered" in flags:
        grad_avg = alpha * present(grad_avg) + one_minus_alpha * grad
        variance = square_avg - grad_avg * grad_avg
        variance = np.where(variance < 0, np.float32(0), variance)
    denom = np.sqrt(variance + eps) if "eps_in_sqrt" in flags else np.sqrt(variance) + eps
    direction = grad / denom
    if "momentum" in flags:
        momentum_buffer = momentum * present(momentum_buffer) + direction
        direction = momentum_buffer
    delta = lr * direction
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (square_avg, momentum_buffer, grad_avg)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns (lr, weight decay, alpha, 1 - alpha, eps, momentum)."""
    alpha, eps, momentum = o[OWN : OWN + 3]
    return o[LR], decay(o, o[LR]), alpha, 1.0 - alpha, eps, momentum


def own(group: Group) -> tuple[float, ...]:
    """Returns (alpha, eps, momentum)."""
    return float(group["alpha"]), float(group["eps"]), float(group["momentum"])


def check(group: Group) -> None:
    """Raises ValueError if an RMSprop option, or its combination with ``states``, is invalid."""
    check_number("eps", group["eps"])
    check_fraction("alpha", group["alpha"])
    check_number("momentum", group["momentum"])
    check_flag("centered", group["centered"])
    check_flag("eps_in_sqrt", group.get("eps_in_sqrt", False))
    states = option(group, "states")
    if group["centered"] and STATE_FORMATS[states].block > 1:
        raise ValueError(
            f"centered=True needs states='fp32' or 'bf16'; got {states!r}. With coarser formats, "
            "square_avg - grad_avg**2 is mostly rounding error, and single steps become millions "
            "of times the learning rate"
        )


RULE = Rule(
    "rmsprop",
    flags=(DECOUPLED_DECAY, Flag("momentum"), Flag("centered"), Flag("eps_in_sqrt")),
    slots=(
        Slot("square_avg", "second"),
        Slot("momentum_buffer", "first", "momentum"),
        Slot("grad_avg", "first", "centered"),
    ),
    own=own,
    derive=derive,
    scalars=6,
    update=update,
    check=check,
    bitsandbytes=BitsAndBytes(
        ("square_avg",),
        betas="alpha",
        lacking={"momentum": 0, "centered": False, "eps_in_sqrt": False},
    ),
    benchmark=Benchmark("rmsprop", {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8}),
)
