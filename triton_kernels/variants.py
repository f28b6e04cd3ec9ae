"""What the code for a chunk is compiled from: a rule with its flags, and the formats."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
import triton.language as tl

from .. import rules as rule_table
from ..formats import ABSENT
from . import formats, rules
from .formats import FORMATS, Format


@dataclass(frozen=True, order=True)
class Variant:
    """What the code for a chunk is compiled from: a rule with its flags, and the formats.

    Attributes:
        rule: name in :data:`onepass.rules.RULES`.
        flags: the rule's, as :meth:`onepass.rules.Rule.flag_bits` gives them.
        param, grad: codes of their formats.
        states: codes of the states' formats, ABSENT for a slot that is not there.
        ema: whether there is an average of the weight.
    """

    rule: str
    flags: int
    param: int
    grad: int
    states: tuple[int, ...]
    ema: bool = False

    @cached_property
    def update(self) -> Any:
        return rules.update_of(self.rule)

    @cached_property
    def scalars(self) -> int:
        return rule_table.RULES[self.rule].scalars

    @cached_property
    def slots(self) -> int:
        return len(rule_table.RULES[self.rule].slots)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return rule_table.RULES[self.rule].kinds

    @cached_property
    def param_format(self) -> Format:
        return FORMATS[self.param]

    @cached_property
    def grad_format(self) -> Format:
        return FORMATS[self.grad]

    @cached_property
    def state_formats(self) -> tuple[Format | None, ...]:
        codes = self.states[: self.slots]
        return tuple(
            None if code == ABSENT else formats.state_format(code, kind, slot)
            for slot, (code, kind) in enumerate(zip(codes, self.kinds, strict=True))
        )

    @cached_property
    def written(self) -> list[Format]:
        return [self.param_format, *filter(None, self.state_formats)]

    @cached_property
    def stochastic(self) -> bool:
        return any(f.stochastic for f in self.written)

    @cached_property
    def root_slot(self) -> int | None:
        """The slot that relative first moments are measured in; None where none are."""
        slot = self.kinds.index("second") if "relative" in self.kinds else None
        if slot is None:
            return None
        found = self.state_formats[slot]
        return slot if found is not None and found.root else None

    @cached_property
    def narrow(self) -> bool:
        """Whether its states have 8 bits or fewer."""
        return any(f is not None and f.element == tl.uint8 for f in self.state_formats)

    @cached_property
    def blocks(self) -> int:
        """Blocks of a program that it takes at once: see Tuning in sweep.py."""
        companions = [f.extra for f in self.written if f.block == 1]
        wide = tl.float32 in [*companions, *(f.element for f in self.written)]
        return 2 if self.narrow and not wide and not self.ema else 1

    @cached_property
    def functions(self) -> list[Any]:
        """The functions that it brings into the kernel."""
        return [self.update, *(f for u in (self.grad_format, *self.written) for f in u.functions)]


class Variants:
    """The variants of a launch, as one constexpr: Triton cannot nest functions in its own tuples.

    Two with the same variants in the same order are equal.
    """

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        self.variants = variants
        self.count = len(variants)
        self.narrow = any(variant.narrow for variant in variants)
        self._hash = hash(variants)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variants) and self.variants == other.variants

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def cache_key(self) -> str:
        """Key of Triton's cache on disk, which cannot see the sources behind a constexpr."""
        sources = [getattr(f, "cache_key", "") for v in self.variants for f in v.functions]
        return hashlib.sha256(repr((self.variants, sources)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Variants_{self.cache_key}"


@triton.constexpr_function
def variant_at(variants, position):
    return variants.variants[position]


@triton.constexpr_function
def has_slot(variant, slot):
    return variant.state_formats[slot] is not None


@triton.constexpr_function
def state_format(variant, slot):
    return variant.state_formats[slot]


@triton.constexpr_function
def root_slot(variant):
    return variant.root_slot
