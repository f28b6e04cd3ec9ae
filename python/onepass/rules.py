"""The table of rules: what every backend and optimizer class needs to know of an algorithm.

A rule's number and the order of its flags and slots are those of ``csrc/rules/table.h`` and of the
headers beside it. ``derive`` turns the options of a parameter group and the number of the step into
the scalars that a kernel reads, in float64 by IEEE operations; they are rounded to fp32 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import reference

Group = Mapping[str, Any]

HYPER_WIDTH = 8  # fp32 scalars in a row of the hyperparameter table: grad_scale, then derive's
SLOTS = 3  # states that a rule can have


@dataclass(frozen=True)
class Rule:
    """One algorithm.

    Attributes:
        name: as in the support matrix.
        code: position in csrc/rules/table.h.
        flags: (name, whether a group has it), in the order of their bits.
        slots: (state key, flag that it takes or None for always, kind), in the order of the states.
            A kind is "first", a mean with a sign; "second", a mean of squares; "relative", a first
            moment whose size goes with the root of the rule's first second moment.
        derive: (group, number of this step from 1, first) -> the scalars after grad_scale. first
            says that the states are new.
        scalars: how many those are.
        update: the specification.
        needs_step: whether derive depends on the step, so that a checkpoint must name it.
        initial: state key -> group option that it starts from; others start at zero.
    """

    name: str
    code: int
    flags: tuple[tuple[str, Callable[[Group], bool]], ...]
    slots: tuple[tuple[str, str | None, str], ...]
    derive: Callable[[Group, int, bool], tuple[float, ...]]
    scalars: int
    update: reference.Update
    needs_step: bool = False
    initial: Mapping[str, str] | None = None

    def flag_bits(self, group: Group) -> int:
        """The flags of a group as an integer, the first flag in bit 0."""
        return sum(1 << bit for bit, (_, holds) in enumerate(self.flags) if holds(group))

    def flag_names(self, bits: int) -> frozenset[str]:
        """The names behind :meth:`flag_bits`."""
        return frozenset(name for bit, (name, _) in enumerate(self.flags) if bits >> bit & 1)

    def state_slots(self, bits: int) -> list[tuple[int, str]]:
        """(slot, state key) of the states that a group with these flags has."""
        names = self.flag_names(bits)
        return [
            (i, key) for i, (key, flag, _) in enumerate(self.slots) if not flag or flag in names
        ]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each slot."""
        return tuple(kind for _, _, kind in self.slots)

    def initial_value(self, key: str, group: Group) -> float:
        """What a state starts at."""
        option = (self.initial or {}).get(key)
        return float(group[option]) if option else 0.0


def power(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring: the same bits wherever float64 is IEEE's.

    pow() differs between C libraries and devices. A running product would do too, but it would have
    to be saved with every checkpoint, and would not follow a schedule that changes beta.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _decay(group: Group, lr: float) -> float:
    decay = float(group["weight_decay"])
    return lr * decay if group["decoupled_weight_decay"] else decay


def _derive_sgd(group: Group, step: int, first: bool) -> tuple[float, ...]:
    lr = float(group["lr"])
    kept = 1.0 if first else 1.0 - float(group["dampening"])
    return lr, _decay(group, lr), float(group["momentum"]), kept


def _derive_adagrad(group: Group, step: int, first: bool) -> tuple[float, ...]:
    lr = float(group["lr"]) / (1.0 + (step - 1) * float(group["lr_decay"]))
    return lr, _decay(group, lr), float(group["eps"])


def _derive_rmsprop(group: Group, step: int, first: bool) -> tuple[float, ...]:
    lr, alpha = float(group["lr"]), float(group["alpha"])
    eps, momentum = float(group["eps"]), float(group["momentum"])
    return lr, _decay(group, lr), alpha, 1.0 - alpha, eps, momentum


def _derive_adam(group: Group, step: int, first: bool) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    root = math.sqrt(1.0 - power(beta2, step))
    step_size = lr * root / (1.0 - power(beta1, step))
    eps = float(group["eps"]) * root
    return step_size, _decay(group, lr), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps


def _derive_lion(group: Group, step: int, first: bool) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    return lr, _decay(group, lr), beta1, 1.0 - beta1, beta2, 1.0 - beta2


def _option(name: str) -> Callable[[Group], bool]:
    return lambda group: bool(group[name])


_DECOUPLED = ("decoupled", _option("decoupled_weight_decay"))
_MOMENTUM = ("momentum", _option("momentum"))
_EPS_IN_SQRT = ("eps_in_sqrt", _option("eps_in_sqrt"))

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "sgd",
            0,
            (_DECOUPLED, _MOMENTUM, ("nesterov", _option("nesterov"))),
            (("momentum_buffer", "momentum", "first"),),
            _derive_sgd,
            4,
            reference.sgd,
        ),
        Rule(
            "adagrad",
            1,
            (_DECOUPLED, _EPS_IN_SQRT),
            (("sum", None, "second"),),
            _derive_adagrad,
            3,
            reference.adagrad,
            needs_step=True,
            initial={"sum": "initial_accumulator_value"},
        ),
        Rule(
            "rmsprop",
            2,
            (_DECOUPLED, _MOMENTUM, ("centered", _option("centered")), _EPS_IN_SQRT),
            (
                ("square_avg", None, "second"),
                ("momentum_buffer", "momentum", "first"),
                ("grad_avg", "centered", "first"),
            ),
            _derive_rmsprop,
            6,
            reference.rmsprop,
        ),
        Rule(
            "adam",
            3,
            (_DECOUPLED, ("amsgrad", _option("amsgrad"))),
            (
                ("exp_avg", None, "relative"),
                ("exp_avg_sq", None, "second"),
                ("max_exp_avg_sq", "amsgrad", "second"),
            ),
            _derive_adam,
            7,
            reference.adam,
            needs_step=True,
        ),
        Rule(
            "lion",
            4,
            (_DECOUPLED,),
            (("exp_avg", None, "first"),),
            _derive_lion,
            6,
            reference.lion,
        ),
    )
}
