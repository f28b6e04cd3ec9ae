"""What a rule is, and the two tables that it is stepped with.

The options table has a row of float64 numbers for each group of parameters with the same history.
``derive`` makes the scalars of a step from a row, in float64 by IEEE operations; rounded once to
fp32 they are a row of the hyperparameter table, which kernels read. Where steps are counted on a
GPU, ``derive`` runs there too (csrc/rules, triton_kernels/rules.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

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

# Columns of the hyperparameter table, fp32: what gradients are multiplied by, the scalars of
# derive, then the decay of the average of the weights and one minus it.
EMA = 1 + MAX_SCALARS
HYPER_WIDTH = EMA + 2


class Slot(NamedTuple):
    """A state of a rule.

    Attributes:
        key: in ``optimizer.state``.
        flag: that it needs, None for always.
        kind: "first", a mean with a sign; "second", a mean of squares; "relative", a first moment
            whose size follows the root of the rule's first second moment.
        starts_at: the group option that it starts from; zero for None.
    """

    key: str
    flag: str | None
    kind: str
    starts_at: str | None = None


class Flag(NamedTuple):
    """A boolean that chooses what a kernel computes.

    Attributes:
        name: in the support matrix and in ``flags`` of an update.
        option: of a group, whose truth it is; None for that of the flag's own name.
    """

    name: str
    option: str | None = None

    def holds(self, group: Group) -> bool:
        """Whether a group has it."""
        name = self.option or self.name
        return bool(group[name] if name in group else option(group, name))


DECOUPLED_DECAY = Flag("decoupled", "decoupled_weight_decay")


class ScalarState(NamedTuple):
    """A number that each parameter keeps beside its step counter, fp32.

    Attributes:
        key: in ``optimizer.state``.
        starts_at: its value before the first step.
    """

    key: str
    starts_at: float


class StepOf(NamedTuple):
    """The step that ``derive`` makes scalars for.

    Attributes:
        number: of the step, from 1.
        first: whether no step has been taken with these states.
        scalar_states: as ``advance`` has made them for this step, in float64.
    """

    number: int
    first: bool
    scalar_states: tuple[float, ...] = ()


@dataclass(frozen=True)
class BitsAndBytes:
    """The optimizer of bitsandbytes that does the same.

    Attributes:
        states: our keys of its state1 and state2.
        betas: our option for its betas, or for the first of them; empty for none.
        decoupled: whether it decouples weight decay.
        lacking: options that it does not have, or that its step does not read, with the value that
            it then has.
        extra: entries of its groups that have no meaning for this rule.
    """

    states: tuple[str, ...]
    betas: str = ""
    decoupled: bool = False
    lacking: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Benchmark:
    """How the rule is measured.

    Attributes:
        optimizer: class of onepass, in lower case.
        options: its keyword arguments. Learning rates are large, so that two steps change weights
            by far more than their rounding.
    """

    optimizer: str
    options: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Rule:
    """One algorithm.

    Attributes:
        name: of its files in every language, and in the support matrix.
        flags: in the order of their bits.
        slots: its states, in order.
        own: group -> its own numbers in a row of the options table.
        derive: (row of the options table, step) -> scalars, in the order in which update takes
            them.
        scalars: how many those are.
        update: the specification of the step, in NumPy.
        check: raises ValueError for an option of a group that is out of range.
        scalar_states: numbers beside the step counter.
        advance: (row of the options table, number of the step, scalar states) -> the scalar states
            of that step, in float64.
        needs_step: whether derive depends on the step, so that a checkpoint must name it.
        needs_first: whether it depends on whether the step is the first.
        saves_step: whether torch.optim saves a step counter; see docs/checkpoints.md.
        bitsandbytes: its counterpart there, if there is one.
        benchmark: how it is measured; None if it is not.
    """

    name: str
    flags: tuple[Flag, ...]
    slots: tuple[Slot, ...]
    own: Callable[[Group], tuple[float, ...]]
    derive: Callable[[Numbers, StepOf], tuple[float, ...]]
    scalars: int
    update: Update
    check: Callable[[Group], None] = lambda group: None
    scalar_states: tuple[ScalarState, ...] = ()
    advance: Callable[[Numbers, int, tuple[float, ...]], tuple[float, ...]] = (
        lambda options, number, scalar_states: scalar_states
    )
    needs_step: bool = False
    needs_first: bool = False
    saves_step: bool = True
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
                raise ValueError(f"rule {self.name!r} has {count} {what}; at most {most} fit")

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each slot."""
        return tuple(slot.key for slot in self.slots)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each slot."""
        return tuple(slot.kind for slot in self.slots)

    def flag_bits(self, group: Group) -> int:
        """The flags of a group as an integer, the first flag in bit 0."""
        return sum(1 << bit for bit, flag in enumerate(self.flags) if flag.holds(group))

    def flag_names(self, bits: int) -> frozenset[str]:
        """The names behind :meth:`flag_bits`."""
        return frozenset(flag.name for bit, flag in enumerate(self.flags) if bits >> bit & 1)

    def state_slots(self, bits: int) -> list[tuple[int, str]]:
        """(slot, state key) of the states that a group with these flags has."""
        names = self.flag_names(bits)
        return [(i, s.key) for i, s in enumerate(self.slots) if not s.flag or s.flag in names]

    def options(self, group: Group) -> tuple[float, ...]:
        """The row of the options table of a group; a tensor's value, of lr for one, is read."""
        own = self.own(group)
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
        """The row of the hyperparameter table of a step, in float64.

        Args:
            options: a row of the options table.
            step: see :class:`StepOf`.
            factor: what gradients are multiplied by, beside the sign of maximize.
        """
        values = self.derive(options, step)
        spare = [0.0] * (MAX_SCALARS - len(values))
        ema = options[EMA_DECAY]
        return [options[SIGN] * factor, *values, *spare, ema, 1.0 - ema]

    def initial_value(self, key: str, group: Group) -> float:
        """What a state starts at."""
        name = next(slot.starts_at for slot in self.slots if slot.key == key)
        return float(group[name]) if name else 0.0


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


def decay(o: Numbers, lr: float) -> float:
    """What a weight is multiplied by to make its decay."""
    return lr * o[WEIGHT_DECAY] if o[DECOUPLED] else o[WEIGHT_DECAY]


def present(state: F32 | None) -> F32:
    """A state that the flags do not leave out."""
    assert state is not None
    return state
