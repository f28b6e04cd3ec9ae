"""The definition of a rule, and the layout of the options and hyperparameter tables.

The options table has one float64 row for all parameters of a group with equal step counters and
scalar states. ``derive`` computes the scalars of a step from a row with float64 IEEE operations.
The scalars are rounded once to fp32 and form a row of the hyperparameter table, which kernels read.
``derive`` runs on the GPU if steps are counted there (csrc/rules, triton_kernels/rules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..formats import StateFormat
from ..numerics.arrays import F32, States
from .group_options import option
from .limits import MAX_FLAGS, MAX_OPTIONS, MAX_SCALAR_STATES, MAX_SCALARS, MAX_STATES

Group = Mapping[str, Any]
Numbers = Sequence[float]
Update = Callable[[F32, F32, States, Sequence[np.float32], Collection[str]], tuple[F32, States]]
"""(param, grad, states, scalars, flags) -> (param, states), on fp32 arrays. States are in the order
of the rule's slots, None where the flags leave one out."""

# Columns of the options table, float64.
SIGN, DECOUPLED, LR, WEIGHT_DECAY, OWN = range(5)
EMA_DECAY = OWN + MAX_OPTIONS
OPTIONS_WIDTH = EMA_DECAY + 1

# Columns of the hyperparameter table, fp32: the factor of the gradients, the scalars that derive
# returns, the decay of the weight average (EMA), and one minus that decay.
EMA = 1 + MAX_SCALARS
HYPER_WIDTH = EMA + 2


class Slot(NamedTuple):
    """A state tensor of a rule.

    Attributes:
        key: the key in ``optimizer.state``.
        kind: "first", a signed mean; "second", a mean of squares; "relative", a first moment whose
            magnitude scales with the square root of the rule's first state of kind "second";
            "weight", a second weight, which starts at the parameter's value and is stored in fp32
            if the format has blocks (``StateFormat.for_weights``).
        flag: the flag that the state requires; None if the state always exists.
        starts_at: the group option that holds the initial value; None for an initial value of 0.
            Not used for the kind "weight".
    """

    key: str
    kind: str
    flag: str | None = None
    starts_at: str | None = None


class Flag(NamedTuple):
    """A boolean that selects a variant of the update in a kernel.

    Attributes:
        name: the name in the support matrix and in the ``flags`` argument of ``update``.
        option: the group option whose truth value sets the flag; None if it has the flag's name.
    """

    name: str
    option: str | None = None

    def holds(self, group: Group) -> bool:
        """Whether the flag is set for a group."""
        name = self.option or self.name
        return bool(group[name] if name in group else option(group, name))


DECOUPLED_DECAY = Flag("decoupled", "decoupled_weight_decay")
CAUTIOUS_DECAY = Flag("cautious", "cautious_weight_decay")


class ScalarState(NamedTuple):
    """An fp32 number that each parameter stores beside its step counter.

    Attributes:
        key: the key in ``optimizer.state``.
        starts_at: the value before the first step.
    """

    key: str
    starts_at: float


class StepOf(NamedTuple):
    """The step for which ``derive`` computes scalars.

    Attributes:
        number: the number of the step, counted from 1.
        first: whether this is the first step with these states.
        scalar_states: the float64 values that ``advance`` returned for this step.
    """

    number: int
    first: bool
    scalar_states: tuple[float, ...] = ()


@dataclass(frozen=True)
class BitsAndBytes:
    """The bitsandbytes optimizer with the same update as a rule.

    Attributes:
        states: the onepass keys of the bitsandbytes states state1 and state2; a tuple of keys for a
            state that is a stack of several.
        betas: the onepass option for the bitsandbytes betas, or for the first beta; empty for none.
        decoupled: whether the bitsandbytes optimizer decouples weight decay.
        lacking: onepass options that bitsandbytes does not have, or does not read in its step, and
            the value that its step assumes for each.
        extra: entries of bitsandbytes groups that this rule ignores.
        same: options that have the same name and meaning in bitsandbytes.
    """

    states: tuple[str | tuple[str, ...], ...]
    betas: str = ""
    decoupled: bool = False
    lacking: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """The benchmark settings of a rule.

    Attributes:
        optimizer: the name of the onepass class, in lower case.
        options: the keyword arguments of the class. The learning rates are large: two steps must
            change the weights by much more than the rounding error.
    """

    optimizer: str
    options: Mapping[str, Any] = field(hash=False)


def _no_numbers(group: Group) -> tuple[float, ...]:
    """The ``own`` of a rule without numbers of its own."""
    return ()


def derive_options(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """lr, the weight-decay coefficient, and the rule's own numbers: the default of custom rules."""
    return o[LR], decay(o, o[LR]), *o[OWN:]


def _no_check(group: Group) -> None:
    """The ``check`` of a rule that accepts every value."""


def keep(o: Numbers, number: int, scalar_states: tuple[float, ...]) -> tuple[float, ...]:
    """The ``advance`` of a rule without scalar states."""
    return scalar_states


@dataclass(frozen=True, eq=False, repr=False)
class Rule:
    """One optimizer algorithm.

    The rules of onepass are in the other files of this folder. Custom rules are of the subclass
    ``onepass.Rule`` (:class:`onepass.rules.custom.Rule`), which sets ``options``.

    Attributes:
        name: the name of the rule. The rules of onepass have files of that name in every language.
        slots: the state tensors, in order.
        update: the specification of the step, in NumPy.
        options: custom rules only: option -> default, or an :class:`Option` with a check. lr (1e-3)
            and weight_decay (0) are added if they are missing. A boolean is also a flag.
        flags: the flags, in the order of their bits. A custom rule appends its boolean options.
        decoupled: custom rules only: whether weight decay is decoupled. With
            :data:`DECOUPLED_DECAY` in ``flags`` this is only the default.
        own: group -> the rule's own numbers in a row of the options table. Custom rules: the
            numbers of ``options`` in order, without lr, weight_decay and booleans.
        derive: (row of the options table, step) -> the scalars, in the order in which ``update``
            unpacks them. Custom rules may omit it: see :func:`derive_options`.
        scalars: the number of scalars that ``derive`` returns; counted for a custom rule.
        check: raises ValueError if an option of a group is out of range.
        scalar_states: the numbers stored beside the step counter.
        advance: (row of the options table, number of the step, scalar states) -> the scalar states
            of that step, in float64.
        triton_update, triton_derive, triton_advance: custom rules only: the functions of the rule
            in Triton, which a GPU needs; see docs/own-rule.md.
        needs_step: whether ``derive`` depends on the step number; a checkpoint must then contain
            the step.
        needs_first: whether ``derive`` depends on ``StepOf.first``.
        saves_step: whether torch.optim saves a step counter; see docs/checkpoints.md.
        formats: the names of the state formats that the rule supports; empty for all.
        laid_out_by: options of a group that a plan reads only when it is built.
        bitsandbytes: the equivalent optimizer of bitsandbytes; None if there is none.
        benchmark: the benchmark settings; None if the rule is not benchmarked.

    Raises:
        ValueError: the rule exceeds a limit of :mod:`onepass.rules.limits`.
    """

    name: str
    slots: tuple[Slot, ...]
    update: Update
    options: Mapping[str, Any] | None = None
    flags: tuple[Flag, ...] = ()
    decoupled: bool = True
    own: Callable[[Group], tuple[float, ...]] = _no_numbers
    derive: Callable[[Numbers, StepOf], tuple[float, ...]] = derive_options
    scalars: int = 0
    check: Callable[[Group], None] = _no_check
    scalar_states: tuple[ScalarState, ...] = ()
    advance: Callable[[Numbers, int, tuple[float, ...]], tuple[float, ...]] = keep
    triton_update: Any = None
    triton_derive: Any = None
    triton_advance: Any = None
    needs_step: bool = False
    needs_first: bool = False
    saves_step: bool = True
    formats: tuple[str, ...] = ()
    laid_out_by: tuple[str, ...] = ()
    bitsandbytes: BitsAndBytes | None = None
    benchmark: Benchmark | None = None

    def __post_init__(self) -> None:
        for what, count, most in (
            ("flags", len(self.flags), MAX_FLAGS),
            ("states", len(self.slots), MAX_STATES),
            ("scalar states", len(self.scalar_states), MAX_SCALAR_STATES),
            ("scalars", self.scalars, MAX_SCALARS),
        ):
            if count > most:
                raise ValueError(
                    f"rule {self.name!r} has {count} {what}; at most {most} are allowed"
                )

    def __repr__(self) -> str:
        return f"Rule({self.name!r})"

    def __lt__(self, other: Rule) -> bool:
        """Orders rules by name, so that lists in another order share a kernel."""
        return self.name < other.name

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each slot."""
        return tuple(slot.key for slot in self.slots)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each slot."""
        return tuple(slot.kind for slot in self.slots)

    def of(self, group: Group) -> Rule:
        """The rule that steps a group: this rule, unless the groups of an optimizer differ."""
        return self

    def flag_bits(self, group: Group) -> int:
        """The flags of a group as an integer, the first flag in bit 0."""
        return sum(1 << bit for bit, flag in enumerate(self.flags) if flag.holds(group))

    def flag_names(self, bits: int) -> frozenset[str]:
        """The names of the flags that are set in an integer from :meth:`flag_bits`."""
        return frozenset(flag.name for bit, flag in enumerate(self.flags) if bits >> bit & 1)

    def state_slots(self, bits: int) -> list[tuple[int, str]]:
        """(slot, state key) of each state that exists in a group with these flags."""
        names = self.flag_names(bits)
        return [(i, s.key) for i, s in enumerate(self.slots) if not s.flag or s.flag in names]

    def kind_of(self, key: str) -> str:
        """The kind of a state."""
        return self.kinds[self.keys.index(key)]

    def format_of(self, key: str, form: StateFormat) -> StateFormat:
        """The format of a state if the option ``states`` selects ``form``."""
        return form.of(self.kind_of(key))

    def options_row(self, group: Group) -> tuple[float, ...]:
        """The group's row of the options table; reads the values of tensor options such as lr."""
        own = self.own(group)
        if len(own) > MAX_OPTIONS:
            raise ValueError(
                f"rule {self.name!r} has {len(own)} options of its own; at most {MAX_OPTIONS} are "
                "allowed"
            )
        return (
            -1.0 if option(group, "maximize") else 1.0,
            1.0 if option(group, "decoupled_weight_decay") else 0.0,
            float(group["lr"]),
            float(group["weight_decay"]),
            *own,
            *[0.0] * (MAX_OPTIONS - len(own)),
            float(option(group, "ema_decay") or 0.0),
        )

    def hyper(self, options: Numbers, step: StepOf, factor: float) -> list[float]:
        """The row of the hyperparameter table for a step, in float64.

        Args:
            options: a row of the options table.
            step: see :class:`StepOf`.
            factor: the factor of the gradients, without the sign that ``maximize`` selects.
        """
        values = self.derive(options, step)
        spare = [0.0] * (MAX_SCALARS - len(values))
        ema = options[EMA_DECAY]
        return [options[SIGN] * factor, *values, *spare, ema, 1.0 - ema]

    def initial_value(self, key: str, group: Group) -> float:
        """The initial value of a state."""
        name = next(slot.starts_at for slot in self.slots if slot.key == key)
        return float(group[name]) if name else 0.0


def power(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring, with the same bits on every IEEE float64 platform.

    pow() differs between C libraries and devices. A running product is also reproducible, but every
    checkpoint would have to store the product, and it would ignore a schedule that changes beta.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def exponential(x: float) -> float:
    """e ** x for a finite x <= 0, with the same bits on every IEEE float64 platform.

    Halves x until it is at least -1/16, adds ten terms of the series, and squares the result as
    often. The relative error is below 1e-15 for x >= -1/16, and doubles with each halving.
    """
    halvings = 0
    while x < -0.0625:
        x *= 0.5
        halvings += 1
    result = 1.0
    for k in range(10, 0, -1):
        result = 1.0 + result * x / k
    for _ in range(halvings):
        result *= result
    return result


def logarithm(x: float) -> float:
    """The natural logarithm of x in (0, 1], with the same bits on every IEEE float64 platform.

    Doubles x until it is at least 1/2, and adds 21 terms of the series of atanh. The absolute error
    is below 1e-15 times the number of doublings plus one. log(1) is exactly 0.
    """
    doublings = 0
    while x < 0.5 and doublings < 1100:  # the bound ends the loop for a 0
        x *= 2.0
        doublings += 1
    part = (x - 1.0) / (x + 1.0)
    square = part * part
    series = 0.0
    for k in range(41, 0, -2):
        series = series * square + 1.0 / k
    return 2.0 * part * series - LOG_2 * doublings


LOG_2 = 0.6931471805599453


def cautious(delta: F32, decayed: F32, param: F32) -> F32:
    """delta + decayed where delta * param >= 0, else delta.

    Adds the decay of a weight only if the update does not move the weight away from 0, see Chen et
    al., "Cautious weight decay" (2025). Compares signs, because the product can underflow.
    """
    opposed = ((delta < 0) & (param > 0)) | ((delta > 0) & (param < 0))
    return np.where(opposed, delta, delta + decayed)


def decay(o: Numbers, lr: float) -> float:
    """The weight-decay coefficient: lr * weight_decay if decoupled, else weight_decay."""
    return lr * o[WEIGHT_DECAY] if o[DECOUPLED] else o[WEIGHT_DECAY]


def present(state: F32 | None) -> F32:
    """Asserts that a state exists, and returns the state."""
    assert state is not None
    return state
