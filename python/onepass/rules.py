"""The table of rules: what every backend and optimizer class needs to know of an algorithm.

A rule's number and the order of its flags and slots are those of ``csrc/rules/table.h`` and of the
headers beside it. ``derive`` turns a row of the options table and the number of the step into the
scalars that a kernel reads, in float64 by IEEE operations; they are rounded to fp32 once. Where
steps are counted on a GPU the same function is there too (csrc/rules, triton_kernels/derive.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import reference
from .groups import option

Group = Mapping[str, Any]
Numbers = Sequence[float]

# fp32 scalars in a row of the hyperparameter table: grad_scale, at most seven of derive's, and the
# decay of the average of the weights with one minus it.
HYPER_WIDTH = 10
EMA = 8
SLOTS = 3  # states that a rule can have

# float64 numbers in a row of the options table, from which a row of hyperparameters is derived. The
# first ones are every rule's; OWN is where those of one rule begin.
OPTIONS_WIDTH = 8
SIGN, DECOUPLED, LR, WEIGHT_DECAY, OWN, EMA_DECAY = 0, 1, 2, 3, 4, 7


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
        own: group -> its own numbers in a row of the options table, at most three.
        derive: (row of the options table, number of this step from 1, first) -> the scalars after
            grad_scale. first says that no step has been taken with these states.
        scalars: how many those are.
        update: the specification.
        needs_step: whether derive depends on the step, so that a checkpoint must name it.
        needs_first: whether it depends on first.
        saves_step: whether torch.optim saves a step counter; see docs/checkpoints.md.
        initial: state key -> group option that it starts from; others start at zero.
    """

    name: str
    code: int
    flags: tuple[tuple[str, Callable[[Group], bool]], ...]
    slots: tuple[tuple[str, str | None, str], ...]
    own: Callable[[Group], tuple[float, ...]]
    derive: Callable[[Numbers, int, bool], tuple[float, ...]]
    scalars: int
    update: reference.Update
    needs_step: bool = False
    needs_first: bool = False
    saves_step: bool = True
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

    def options(self, group: Group) -> tuple[float, ...]:
        """The row of the options table of a group; a tensor's value, of lr for one, is read."""
        own = self.own(group)
        return (
            -1.0 if option(group, "maximize") else 1.0,
            1.0 if option(group, "decoupled_weight_decay") else 0.0,
            float(group["lr"]),
            float(group["weight_decay"]),
            *own,
            *[0.0] * (EMA_DECAY - OWN - len(own)),
            float(option(group, "ema_decay") or 0.0),
        )

    def hyper(self, options: Numbers, step: int, first: bool, factor: float) -> list[float]:
        """The row of hyperparameters of a step, in float64.

        Args:
            options: a row of the options table.
            step, first: as for derive.
            factor: what gradients are multiplied by, beside the sign of maximize.
        """
        values = self.derive(options, step, first)
        spare = [0.0] * (EMA - 1 - len(values))
        ema = options[EMA_DECAY]
        return [options[SIGN] * factor, *values, *spare, ema, 1.0 - ema]

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


def _decay(o: Numbers) -> float:
    return o[LR] * o[WEIGHT_DECAY] if o[DECOUPLED] else o[WEIGHT_DECAY]


def _sgd(group: Group) -> tuple[float, ...]:
    return float(group["momentum"]), float(group["dampening"])


def _derive_sgd(o: Numbers, step: int, first: bool) -> tuple[float, ...]:
    momentum, dampening = o[OWN : OWN + 2]
    kept = 1.0 if first else 1.0 - dampening
    return o[LR], _decay(o), momentum, kept


def _adagrad(group: Group) -> tuple[float, ...]:
    return float(group["eps"]), float(group["lr_decay"])


def _derive_adagrad(o: Numbers, step: int, first: bool) -> tuple[float, ...]:
    eps, lr_decay = o[OWN : OWN + 2]
    lr = o[LR] / (1.0 + (step - 1) * lr_decay)
    decay = lr * o[WEIGHT_DECAY] if o[DECOUPLED] else o[WEIGHT_DECAY]
    return lr, decay, eps


def _rmsprop(group: Group) -> tuple[float, ...]:
    return float(group["alpha"]), float(group["eps"]), float(group["momentum"])


def _derive_rmsprop(o: Numbers, step: int, first: bool) -> tuple[float, ...]:
    alpha, eps, momentum = o[OWN : OWN + 3]
    return o[LR], _decay(o), alpha, 1.0 - alpha, eps, momentum


def _adam(group: Group) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2, float(group["eps"])


def _derive_adam(o: Numbers, step: int, first: bool) -> tuple[float, ...]:
    beta1, beta2, eps = o[OWN : OWN + 3]
    root = math.sqrt(1.0 - power(beta2, step))
    step_size = o[LR] * root / (1.0 - power(beta1, step))
    return step_size, _decay(o), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


def _lion(group: Group) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2


def _derive_lion(o: Numbers, step: int, first: bool) -> tuple[float, ...]:
    beta1, beta2 = o[OWN : OWN + 2]
    return o[LR], _decay(o), beta1, 1.0 - beta1, beta2, 1.0 - beta2


def _option(name: str) -> Callable[[Group], bool]:
    return lambda group: bool(group[name])


_DECOUPLED = ("decoupled", lambda group: bool(option(group, "decoupled_weight_decay")))
_MOMENTUM = ("momentum", _option("momentum"))
_EPS_IN_SQRT = ("eps_in_sqrt", lambda group: bool(option(group, "eps_in_sqrt")))

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "sgd",
            0,
            (_DECOUPLED, _MOMENTUM, ("nesterov", _option("nesterov"))),
            (("momentum_buffer", "momentum", "first"),),
            _sgd,
            _derive_sgd,
            4,
            reference.sgd,
            needs_first=True,
            saves_step=False,
        ),
        Rule(
            "adagrad",
            1,
            (_DECOUPLED, _EPS_IN_SQRT),
            (("sum", None, "second"),),
            _adagrad,
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
            _rmsprop,
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
            _adam,
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
            _lion,
            _derive_lion,
            6,
            reference.lion,
        ),
    )
}
