"""Adam and AdamW, which differ in one flag, ``decoupled``.

Source: Kingma, Ba, "Adam: a method for stochastic optimization" (2015); Loshchilov, Hutter,
"Decoupled weight decay regularization" (2019); amsgrad: Reddi, Kale, Kumar, "On the convergence of
Adam and beyond" (2018).
"""

from __future__ import annotations

import math
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
    Flag,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    cautious,
    decay,
    power,
    present,
)
from .option_checks import check_betas, check_flag, check_number


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Adam (Kingma, Ba 2015), AdamW (Loshchilov, Hutter 2019), amsgrad (Reddi et al. 2018).

    The scalars in h include the bias corrections: step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t),
    and eps is multiplied by sqrt(1 - beta2^t). One square root and one division per element remain.
    """
    step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_sq, max_exp_avg_sq = present(states[0]), present(states[1]), states[2]
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    second = exp_avg_sq
    if "amsgrad" in flags:
        highest = present(max_exp_avg_sq)
        max_exp_avg_sq = np.where(highest >= exp_avg_sq, highest, exp_avg_sq)
        second = max_exp_avg_sq
    denom = np.sqrt(second) + eps
    delta = step_size * (exp_avg / denom)
    if "cautious" in flags:
        delta = cautious(delta, weight_decay * param, param)
    elif "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq, max_exp_avg_sq)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns the scalars of a step, with the bias corrections in step_size and eps."""
    beta1, beta2, eps = o[OWN : OWN + 3]
    root = math.sqrt(1.0 - power(beta2, step.number))
    step_size = o[LR] * root / (1.0 - power(beta1, step.number))
    return step_size, decay(o, o[LR]), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


def own(group: Group) -> tuple[float, ...]:
    """Returns (beta1, beta2, eps)."""
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2, float(group["eps"])


def check(group: Group) -> None:
    """Raises ValueError if an Adam option of a group is invalid."""
    check_number("eps", group["eps"])
    check_betas(group["betas"])
    check_flag("amsgrad", group["amsgrad"])


RULE = Rule(
    "adam",
    flags=(DECOUPLED_DECAY, Flag("amsgrad"), CAUTIOUS_DECAY),
    slots=(
        Slot("exp_avg", "relative"),
        Slot("exp_avg_sq", "second"),
        Slot("max_exp_avg_sq", "second", "amsgrad"),
    ),
    own=own,
    derive=derive,
    scalars=7,
    update=update,
    check=check,
    needs_step=True,
    # Adam in bitsandbytes decouples weight decay, as AdamW does there.
    bitsandbytes=BitsAndBytes(
        ("exp_avg", "exp_avg_sq"),
        betas="betas",
        decoupled=True,
        lacking={"amsgrad": False, "cautious_weight_decay": False},
        extra={"alpha": 0.0, "t_alpha": None, "t_beta3": None},
    ),
    benchmark=Benchmark(
        "adamw", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    ),
)
