"""NAdam: Adam with Nesterov momentum and a warm-up of the momentum coefficient.

Source: Dozat, "Incorporating Nesterov momentum into Adam" (2016), with the momentum schedule of
torch.optim.NAdam.
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
    Group,
    Numbers,
    Rule,
    ScalarState,
    Slot,
    StepOf,
    cautious,
    decay,
    power,
    present,
)
from .option_checks import check_betas, check_number


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """NAdam (Dozat 2016), with the same formula as torch.optim.NAdam.

    The scalars in h include the bias corrections: both step sizes and eps are multiplied by
    sqrt(1 - beta2^t). One square root and one division per element remain.
    """
    grad_size, avg_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_sq = present(states[0]), present(states[1])
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    denom = np.sqrt(exp_avg_sq) + eps
    delta = (grad_size * grad + avg_size * exp_avg) / denom
    if "cautious" in flags:
        delta = cautious(delta, weight_decay * param, param)
    elif "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq)


def advance(o: Numbers, number: int, scalar_states: tuple[float, ...]) -> tuple[float, ...]:
    """Returns (mu_product,), the product of the momentum coefficients of all steps so far."""
    (mu_product,) = scalar_states
    return (mu_product * momentum(o, number),)


def momentum(o: Numbers, number: int) -> float:
    """The momentum coefficient mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2) of step t."""
    beta1, _, _, warm_up = o[OWN : OWN + 4]
    return beta1 * (1.0 - 0.5 * power(warm_up, number))


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns the scalars of a step, with the bias corrections in both step sizes and eps."""
    beta1, beta2, eps, _ = o[OWN : OWN + 4]
    mu, mu_next = momentum(o, step.number), momentum(o, step.number + 1)
    (mu_product,) = step.scalar_states
    root = math.sqrt(1.0 - power(beta2, step.number))
    scale = o[LR] * root
    grad_size = scale * (1.0 - mu) / (1.0 - mu_product)
    avg_size = scale * mu_next / (1.0 - mu_product * mu_next)
    weight_decay = decay(o, o[LR])
    return grad_size, avg_size, weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


def own(group: Group) -> tuple[float, ...]:
    """Returns (beta1, beta2, eps, 0.96 ** momentum_decay).

    power() later raises the last value to the step number, because pow() differs between platforms.
    """
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2, float(group["eps"]), 0.96 ** float(group["momentum_decay"])


def check(group: Group) -> None:
    """Raises ValueError if a NAdam option of a group is invalid."""
    check_number("eps", group["eps"])
    check_betas(group["betas"])
    check_number("momentum_decay", group["momentum_decay"])


RULE = Rule(
    "nadam",
    flags=(DECOUPLED_DECAY, CAUTIOUS_DECAY),
    slots=(Slot("exp_avg", "relative"), Slot("exp_avg_sq", "second")),
    own=own,
    derive=derive,
    scalars=8,
    update=update,
    check=check,
    scalar_states=(ScalarState("mu_product", 1.0),),
    advance=advance,
    needs_step=True,
    benchmark=Benchmark("nadam", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}),
)
