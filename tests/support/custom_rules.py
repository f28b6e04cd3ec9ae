"""Custom rules for the tests, with their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

import onepass
from onepass.rules import DECOUPLED_DECAY, LR, OWN, Flag, Option, ScalarState, Slot, decay, power
from onepass.rules.option_checks import check_betas, check_number

try:
    import triton
    import triton.language as tl

    from onepass.triton_kernels import rules as triton_rules
except ImportError:
    triton = None


# --- Signum: options, one state and an update ---


def signum(param, grad, states, h, flags):
    """Signum (Bernstein et al. 2018) with decoupled weight decay."""
    lr, weight_decay, beta = h
    exp_avg = beta * states[0] + (1 - beta) * grad
    return param - (lr * np.sign(exp_avg) + weight_decay * param), (exp_avg,)


# --- AdaBelief: every part that a rule can have ---


def adabelief(param, grad, states, h, flags):
    """AdaBelief (Zhuang et al. 2020); ``highest`` keeps the largest variance, as amsgrad does."""
    step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_var, highest_var = states
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    belief = grad - exp_avg
    exp_avg_var = beta2 * exp_avg_var + one_minus_beta2 * (belief * belief)
    variance = exp_avg_var
    if "highest" in flags:
        highest_var = np.where(highest_var >= exp_avg_var, highest_var, exp_avg_var)
        variance = highest_var
    delta = step_size * (exp_avg / (np.sqrt(variance) + eps))
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_var, highest_var)


def derive(o, step):
    beta1, beta2, eps = o[OWN : OWN + 3]
    root = math.sqrt(1.0 - power(beta2, step.number))
    (product,) = step.scalar_states
    step_size = o[LR] * root / (1.0 - product)
    return step_size, decay(o, o[LR]), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


def advance(o, number, scalar_states):
    """The product of beta1 over the steps; bias correction divides by 1 minus the product."""
    return (scalar_states[0] * o[OWN],)


TRITON = {}
if triton is not None:

    @triton.jit
    def signum_triton(param, grad, states, h, FLAGS: tl.constexpr):
        lr, weight_decay, beta = h
        exp_avg = beta * states[0] + (1 - beta) * grad
        sign = tl.where(exp_avg > 0, 1.0, tl.where(exp_avg < 0, -1.0, exp_avg))
        return param - (lr * sign + weight_decay * param), (exp_avg,)

    @triton.jit
    def adabelief_triton(param, grad, states, h, FLAGS: tl.constexpr):
        DECOUPLED: tl.constexpr = FLAGS & 1
        HIGHEST: tl.constexpr = FLAGS & 2
        step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
        exp_avg, exp_avg_var, highest_var = states
        if not DECOUPLED:
            grad = grad + weight_decay * param
        exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
        belief = grad - exp_avg
        exp_avg_var = beta2 * exp_avg_var + one_minus_beta2 * (belief * belief)
        variance = exp_avg_var
        if HIGHEST:
            highest_var = tl.where(highest_var >= exp_avg_var, highest_var, exp_avg_var)
            variance = highest_var
        delta = step_size * tl.div_rn(exp_avg, tl.sqrt_rn(variance) + eps)
        if DECOUPLED:
            delta = delta + weight_decay * param
        return param - delta, (exp_avg, exp_avg_var, highest_var)

    @triton.jit
    def derive_triton(o, step, first, scalar_states):
        beta1, beta2, eps = o[OWN_COLUMN], o[OWN_COLUMN + 1], o[OWN_COLUMN + 2]
        root = tl.sqrt(1.0 - triton_rules.power(beta2, step))
        step_size = o[LR_COLUMN] * root / (1.0 - scalar_states[0])
        weight_decay = triton_rules.decay(o, o[LR_COLUMN])
        return step_size, weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root

    @triton.jit
    def advance_triton(o, step, scalar_states):
        return (scalar_states[0] * o[OWN_COLUMN],)

    OWN_COLUMN, LR_COLUMN = tl.constexpr(OWN), tl.constexpr(LR)
    TRITON = {
        "triton_update": adabelief_triton,
        "triton_derive": derive_triton,
        "triton_advance": advance_triton,
    }

SIGNUM = onepass.Rule(
    "signum",
    options={"beta": 0.9},
    slots=(Slot("exp_avg", "first"),),
    update=signum,
    triton_update=signum_triton if TRITON else None,
)
ADABELIEF = onepass.Rule(
    "adabelief",
    options={
        "betas": Option((0.9, 0.999), lambda name, value: check_betas(value)),
        "eps": Option(1e-8, check_number),
        "highest": False,
    },
    flags=(DECOUPLED_DECAY, Flag("highest")),
    slots=(
        Slot("exp_avg", "relative"),
        Slot("exp_avg_var", "second"),
        Slot("highest_var", "second", "highest"),
    ),
    update=adabelief,
    derive=derive,
    scalar_states=(ScalarState("beta1_product", 1.0),),
    advance=advance,
    **TRITON,
)
Signum = onepass.optimizer(SIGNUM)
AdaBelief = onepass.optimizer(ADABELIEF, "AdaBelief")


class Float64:
    """One parameter updated by a custom rule in float64, as in the rule's paper."""

    def __init__(self, param, options):
        self.p, self.o, self.t = param.detach().double().clone(), options, 0
        self.m, self.v, self.top = (torch.zeros_like(self.p) for _ in range(3))

    def signum(self, grad):
        o, g = self.o, grad.double()
        self.m = o["beta"] * self.m + (1 - o["beta"]) * g
        self.p = self.p - o["lr"] * (torch.sign(self.m) + o["weight_decay"] * self.p)

    def adabelief(self, grad):
        o, g = self.o, grad.double()
        (beta1, beta2), wd = o["betas"], o["weight_decay"]
        self.t += 1
        if not o["decoupled_weight_decay"]:
            g = g + wd * self.p
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * (g - self.m) ** 2
        v = self.v
        if o["highest"]:
            v = self.top = torch.maximum(self.top, self.v)
        direction = self.m / (1 - beta1**self.t) / ((v / (1 - beta2**self.t)).sqrt() + o["eps"])
        if o["decoupled_weight_decay"]:
            direction = direction + wd * self.p
        self.p = self.p - o["lr"] * direction


def trains_sharded(directory):
    """Checks that FSDP2 with a custom rule has the bits of one process; every rank calls it."""
    from ..zero_model import pair, same_as_twin, train

    for kind, options in ((AdaBelief, {"highest": True}), (Signum, {"max_grad_norm": 0.1})):
        four = pair(kind, **options)
        train(*four, 2)
        assert same_as_twin(*four) == len(list(four[0].parameters()))
    four = pair(AdaBelief, states="mx8")
    train(*four, 2)
    assert same_as_twin(*four, block=32) >= 5
