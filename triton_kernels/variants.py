"""The variants of the sweep kernel: compile-time combinations of a rule, its flags and formats."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
import triton.language as tl

from onepass.numerics.random_bits import SHARED_WEIGHT_BITS, STATE_BITS, WEIGHT_BITS
from onepass.rules import RULES, Rule

from ..formats import ABSENT
from . import formats, rules
from .formats import FORMATS, Format
from .roots import SHARED_ROOT


@dataclass(frozen=True, order=True)
class Variant:
    """The compile-time properties of a chunk: a rule with its flags, and the formats.

    Attributes:
        rule: the rule.
        flags: the flags of the rule, as :meth:`onepass.rules.Rule.flag_bits` returns them.
        param, grad: numbers of the formats of the parameter and the gradient.
        states: numbers of the formats of the states; ABSENT for a slot without a state.
        ema: whether the weight has an average.
        changed: whether changed weights are recorded.
    """

    rule: Rule
    flags: int
    param: int
    grad: int
    states: tuple[int, ...]
    ema: bool = False
    changed: bool = False

    @cached_property
    def update(self) -> Any:
        """The update function of the rule."""
        return rules.update_of(self.rule)

    @cached_property
    def scalars(self) -> int:
        """The number of fp32 scalars that the update takes."""
        return self.rule.scalars

    @cached_property
    def slots(self) -> int:
        """The number of slots of the rule, with or without a state."""
        return len(self.rule.slots)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kind of moment of each slot."""
        return self.rule.kinds

    @cached_property
    def param_format(self) -> Format:
        """The format of the parameter."""
        return FORMATS[self.param]

    @cached_property
    def grad_format(self) -> Format:
        """The format of the gradient."""
        return FORMATS[self.grad]

    @cached_property
    def state_formats(self) -> tuple[Format | None, ...]:
        """The format of each slot; None for a slot without a state."""
        codes = self.states[: self.slots]
        return tuple(
            None if code == ABSENT else formats.state_format(code, kind, slot)
            for slot, (code, kind) in enumerate(zip(codes, self.kinds, strict=True))
        )

    @cached_property
    def written(self) -> list[Format]:
        """The formats that the kernel encodes."""
        return [self.param_format, *filter(None, self.state_formats)]

    @cached_property
    def stochastic(self) -> bool:
        """Whether any format draws random bits."""
        return any(f.stochastic for f in self.written)

    @cached_property
    def weight_bits(self) -> int:
        """The position of the random bits of the weight; see
        :func:`onepass.numerics.random_bits.bits_from`."""
        if self.param_format.position is not None:
            return self.param_format.position
        drawn = any(f is not None and f.stochastic for f in self.state_formats)
        return SHARED_WEIGHT_BITS if drawn else WEIGHT_BITS

    @cached_property
    def root_slot(self) -> int | None:
        """The slot whose root is the unit of relative first moments; None if there is none."""
        slot = self.kinds.index("second") if "relative" in self.kinds else None
        if slot is None:
            return None
        found = self.state_formats[slot]
        return slot if found is not None and found.root else None

    @cached_property
    def update_flags(self) -> int:
        """The flags that the update function takes. A rule of the user gets its own flags only."""
        built_in = RULES.get(self.rule.name) is self.rule
        shared = built_in and self.root_slot is not None
        return self.flags | (SHARED_ROOT.value if shared else 0)

    @cached_property
    def narrow(self) -> bool:
        """Whether a state has 8 bits or fewer."""
        return any(f is not None and f.element == tl.uint8 for f in self.state_formats)

    @cached_property
    def blocks(self) -> int:
        """The number of blocks that a program takes at once; see Tuning in table.py."""
        companions = [f.extra for f in self.written if f.block == 1]
        wide = tl.float32 in [*companions, *(f.element for f in self.written)]
        return 1 if wide or self.ema else 2

    @cached_property
    def functions(self) -> list[Any]:
        """The Triton functions that the variant compiles into the kernel."""
        return [self.update, *(f for u in (self.grad_format, *self.written) for f in u.functions)]


class Variants:
    """The variants of a launch as one constexpr, because tuples of Triton cannot nest functions.

    Two objects are equal if they have the same variants in the same order.
    """

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        self.variants = variants
        self.count = len(variants)
        # Whether states have 8 bits or fewer, or a thread takes eight elements.
        self.limited = any(variant.narrow or variant.blocks == 2 for variant in variants)
        # Whether changes are recorded, of weights without companions and with two states at most.
        self.small_recording = all(
            v.changed and v.blocks == 1 and v.param_format.extra is None and len(v.written) <= 3
            for v in variants
        )
        self._hash = hash(variants)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variants) and self.variants == other.variants

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def cache_key(self) -> str:
        """The key in Triton's cache on disk; Triton does not hash the sources of a constexpr."""
        sources = [getattr(f, "cache_key", "") for v in self.variants for f in v.functions]
        # A custom rule may change between two runs without a change of its name or its update.
        slots = [(v.rule.slots, v.scalars) for v in self.variants]
        return hashlib.sha256(repr((self.variants, slots, sources)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Variants_{self.cache_key}"


@triton.constexpr_function
def variant_at(variants, position):
    """The variant at a position of Variants."""
    return variants.variants[position]


@triton.constexpr_function
def has_slot(variant, slot):
    """Whether a slot has a state."""
    return variant.state_formats[slot] is not None


@triton.constexpr_function
def state_format(variant, slot):
    """The format of a slot; None if it has no state."""
    return variant.state_formats[slot]


@triton.constexpr_function
def root_slot(variant):
    """Variant.root_slot."""
    return variant.root_slot


@triton.constexpr_function
def state_bits(slot):
    """The position of the random bits of a slot."""
    return STATE_BITS[slot]


@triton.constexpr_function
def weight_bits(variant):
    """Variant.weight_bits."""
    return variant.weight_bits
