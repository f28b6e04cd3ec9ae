"""Schedule-free AdamW: averages of the weights replace a schedule of the learning rate.

Source: Defazio et al., "The road less scheduled" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from ..numerics.arrays import F32, States
from .base import (
    DECOUPLED_DECAY,
    LR,
    OWN,
    Benchmark,
    Group,
    Numbers,
    Rule,
    ScalarState,
    Slot,
    StepOf,
    decay,
    exponential,
    logarithm,
    power,
    present,
)
from .option_checks import check_betas, check_flag, check_number, check_whole

MAX_POWER = 100.0  # the largest r and weight_lr_power, whose powers float64 holds


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Schedule-free AdamW (Defazio et al. 2024); param is y, at which gradients are computed.

    The scalars in h include the bias correction: step_size and eps are multiplied by
    sqrt(1 - beta2^t). One square root and one division per element remain.
    """
    step_size, weight_decay, beta2, one_minus_beta2, eps, share, scale = h
    z, exp_avg_sq = present(states[0]), present(states[1])
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    denom = np.sqrt(exp_avg_sq) + eps
    delta = step_size * (grad / denom)
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    param = param - (scale * delta - share * (z - param))
    return param, (z - delta, exp_avg_sq)


def warmed_up(o: Numbers, number: int) -> float:
    """The learning rate of step ``number``, which rises linearly over the first warmup_steps."""
    warmup_steps = o[OWN + 3]
    return o[LR] * (float(number) / warmup_steps) if number < warmup_steps else o[LR]


def advance(o: Numbers, number: int, scalar_states: tuple[float, ...]) -> tuple[float, ...]:
    """Returns (weight_sum, lr_max) of a step.

    Step t has the weight w_t = t^r lr_max^p in the average, with the largest learning rate so far
    and p = weight_lr_power. weight_sum is (w_1 + ... + w_t) / w_t, which fp32 stores exactly while
    the learning rate is constant. It is 0 while all weights are 0.
    """
    r, lr_power = o[OWN + 4], o[OWN + 5]
    weight_sum, lr_max = scalar_states
    largest = float(np.float32(warmed_up(o, number)))
    if lr_max > largest:
        largest = lr_max
    if largest <= 0.0 and lr_power > 0.0:
        return 0.0, 0.0
    if weight_sum <= 0.0:
        return 1.0, largest
    exponent = 0.0  # the logarithm of the weight of the step before, divided by that of this step
    if r > 0.0 and number > 1:
        exponent = r * logarithm(float(number - 1) / float(number))
    if lr_power > 0.0 and 0.0 < lr_max < largest:
        exponent = exponent + lr_power * logarithm(lr_max / largest)
    return weight_sum * exponential(exponent) + 1.0, largest


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns the scalars of a step; share is the weight of z in the average x."""
    beta1, beta2, eps = o[OWN : OWN + 3]
    weight_sum = step.scalar_states[0]
    lr = warmed_up(o, step.number)
    root = math.sqrt(1.0 - power(beta2, step.number))
    share = 1.0 / weight_sum if weight_sum > 0.0 else 0.0
    scale = 1.0 - beta1 * (1.0 - share)
    return lr * root, decay(o, lr), beta2, 1.0 - beta2, eps * root, share, scale


def own(group: Group) -> tuple[float, ...]:
    """Returns (beta1, beta2, eps, warmup_steps, r, weight_lr_power)."""
    beta1, beta2 = map(float, group["betas"])
    names = ("eps", "warmup_steps", "r", "weight_lr_power")
    return beta1, beta2, *(float(group[name]) for name in names)


def check(group: Group) -> None:
    """Raises ValueError if a schedule-free option of a group is invalid."""
    check_number("eps", group["eps"])
    check_betas(group["betas"])
    if not float(group["betas"][0]) > 0.0:
        raise ValueError(
            "betas[0] must be in (0, 1), because eval() divides by it; got "
            f"{float(group['betas'][0])}"
        )
    check_whole("warmup_steps", group["warmup_steps"])
    for name in ("r", "weight_lr_power"):
        check_number(name, group[name])
        if float(group[name]) > MAX_POWER:
            raise ValueError(f"{name} must be at most {MAX_POWER:g}; got {float(group[name]):g}")
    check_flag("train_mode", group["train_mode"])


RULE = Rule(
    "schedulefree",
    flags=(DECOUPLED_DECAY,),
    slots=(Slot("z", "weight"), Slot("exp_avg_sq", "second")),
    own=own,
    derive=derive,
    scalars=7,
    update=update,
    check=check,
    scalar_states=(ScalarState("weight_sum", 0.0), ScalarState("lr_max", 0.0)),
    advance=advance,
    needs_step=True,
    benchmark=Benchmark(
        "adamwschedulefree", {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    ),
)
