"""SGD, with optional momentum and Nesterov momentum, as in torch.optim.SGD.

Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
learning" (2013).
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
    Flag,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    cautious,
    decay,
    present,
)
from .option_checks import check_flag, check_number


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """SGD, momentum and Nesterov momentum as in torch.optim.SGD (Sutskever et al. 2013)."""
    lr, weight_decay, momentum, one_minus_dampening = h
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    direction = grad
    momentum_buffer = states[0]
    if "momentum" in flags:
        momentum_buffer = momentum * present(momentum_buffer) + one_minus_dampening * grad
        direction = grad + momentum * momentum_buffer if "nesterov" in flags else momentum_buffer
    delta = lr * direction
    if "cautious" in flags:
        delta = cautious(delta, weight_decay * param, param)
    elif "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (momentum_buffer,)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns (lr, weight decay, momentum, one minus dampening).

    The first step ignores dampening, so the buffer starts at the gradient, as in torch.optim.SGD.
    """
    momentum, dampening = o[OWN : OWN + 2]
    kept = 1.0 if step.first else 1.0 - dampening
    return o[LR], decay(o, o[LR]), momentum, kept


def own(group: Group) -> tuple[float, ...]:
    """Returns (momentum, dampening)."""
    return float(group["momentum"]), float(group["dampening"])


def check(group: Group) -> None:
    """Raises ValueError if an SGD option of a group is invalid."""
    check_number("momentum", group["momentum"])
    check_number("dampening", group["dampening"], least=float("-inf"))
    check_flag("nesterov", group["nesterov"])
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0; got "
            f"momentum={group['momentum']}, dampening={group['dampening']}"
        )


RULE = Rule(
    "sgd",
    flags=(DECOUPLED_DECAY, Flag("momentum"), Flag("nesterov"), CAUTIOUS_DECAY),
    slots=(Slot("momentum_buffer", "first", "momentum"),),
    own=own,
    derive=derive,
    scalars=4,
    update=update,
    check=check,
    needs_first=True,
    saves_step=False,
    bitsandbytes=BitsAndBytes(
        ("momentum_buffer",),
        betas="momentum",
        lacking={"dampening": 0, "nesterov": False, "cautious_weight_decay": False},
    ),
    benchmark=Benchmark("sgd", {"lr": 1e-1, "momentum": 0.9}),
)
