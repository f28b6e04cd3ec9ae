"""AdEMAMix: Adam with a second, slow average of the gradients.

Source: Pagliardini, Ablin, Grangier, "The AdEMAMix optimizer: better, faster, older" (2024).
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
    BitsAndBytes,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    decay,
    exponential,
    power,
    present,
)
from .option_checks import check_betas, check_number, check_whole

LEAST = 5e-324  # replaces a beta of 0 in logarithms


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """AdEMAMix (Pagliardini et al. 2024), algorithm 1.

    The scalars in h include the bias corrections and alpha: both step sizes and eps are multiplied
    by sqrt(1 - beta2^t). One square root and one division per element remain.
    """
    fast_size, slow_size, weight_decay = h[:3]
    beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, eps = h[3:]
    exp_avg, exp_avg_slow, exp_avg_sq = map(present, states)
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_slow = beta3 * exp_avg_slow + one_minus_beta3 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    denom = np.sqrt(exp_avg_sq) + eps
    delta = (fast_size * exp_avg + slow_size * exp_avg_slow) / denom
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_slow, exp_avg_sq)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns the scalars of a step, with the warm-up of alpha and beta3."""
    beta1, beta2, beta3, eps, alpha, t_alpha, t_beta3, log_beta1, log_beta3 = o[OWN : OWN + 9]
    number = float(step.number)
    if number < t_alpha:
        alpha = alpha * (number / t_alpha)
    if number < t_beta3:
        # The half-life of the slow average rises linearly from that of beta1 to that of beta3.
        part = number / t_beta3
        mixed = (1.0 - part) * log_beta3 + part * log_beta1
        beta3 = exponential(log_beta1 * log_beta3 / mixed)
    root = math.sqrt(1.0 - power(beta2, step.number))
    fast_size = o[LR] * root / (1.0 - power(beta1, step.number))
    slow_size = o[LR] * root * alpha
    averages = beta1, 1.0 - beta1, beta2, 1.0 - beta2, beta3, 1.0 - beta3
    return fast_size, slow_size, decay(o, o[LR]), *averages, eps * root


def own(group: Group) -> tuple[float, ...]:
    """Returns (beta1, beta2, beta3, eps, alpha, t_alpha, t_beta3, log(beta1), log(beta3)).

    A warm-up that is None takes 0 steps. The host computes the logarithms because their last bits
    differ between platforms.
    """
    beta1, beta2, beta3 = map(float, group["betas"])
    logs = (math.log(max(beta, LEAST)) for beta in (beta1, beta3))
    warm_ups = (float(group[name] or 0) for name in ("t_alpha", "t_beta3"))
    return beta1, beta2, beta3, float(group["eps"]), float(group["alpha"]), *warm_ups, *logs


def check(group: Group) -> None:
    """Raises ValueError if an AdEMAMix option of a group is invalid."""
    check_number("eps", group["eps"])
    check_number("alpha", group["alpha"])
    check_betas(group["betas"], 3)
    for name in ("t_alpha", "t_beta3"):
        if group[name] is not None:
            check_whole(name, group[name])


RULE = Rule(
    "ademamix",
    flags=(DECOUPLED_DECAY,),
    slots=(
        Slot("exp_avg", "relative"),
        Slot("exp_avg_slow", "relative"),
        Slot("exp_avg_sq", "second"),
    ),
    own=own,
    derive=derive,
    scalars=10,
    update=update,
    check=check,
    needs_step=True,
    bitsandbytes=BitsAndBytes(
        (("exp_avg", "exp_avg_slow"), "exp_avg_sq"),
        betas="betas",
        decoupled=True,
        same=("alpha", "t_alpha", "t_beta3"),
    ),
    benchmark=Benchmark("ademamix", {"lr": 1e-2, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0}),
)
