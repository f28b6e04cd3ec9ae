"""A case: rule x formats x parameter list, and the bytes that a step of it has to move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.optim.registry import classes
from onepass.rules import RULES

from .param_lists import ParamList

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Well beyond a shared last-level cache; what moves less per step may stay in it.
BEYOND_CACHE = 1 << 29

OPTIONS: dict[str, dict[str, Any]] = {
    rule.benchmark.optimizer: dict(rule.benchmark.options)
    for rule in RULES.values()
    if rule.benchmark is not None
}
"""The options of each measured class of onepass, by its name in lower case."""


@cache
def group_of(rule: str) -> Mapping[str, Any]:
    """A parameter group with the options of a key of OPTIONS."""
    param = torch.nn.Parameter(torch.empty(1, device="meta"))
    group = classes()[rule]([param], **OPTIONS[rule]).param_groups[0]
    return {name: value for name, value in group.items() if name != "params"}


@cache
def state_count(rule: str) -> int:
    """Values that a key of OPTIONS keeps per element."""
    found = classes()[rule].rule
    return len(found.state_slots(found.flag_bits(group_of(rule))))


def bytes_moved(rule: str, weight: int, extra: int, state: float) -> float:
    """Bytes of a step per element: weight and companion read and written, gradient read, each state
    read and written.

    Args:
        rule: a key of OPTIONS.
        weight: bytes of a weight, and of its gradient.
        extra: of what is kept beside a weight.
        state: of one value of a state.
    """
    return 2 * (weight + extra) + weight + state_count(rule) * 2 * state


@dataclass(frozen=True)
class Case:
    """One row of a benchmark; gradients have the dtype of the weights.

    A provider that is there for comparison may have a dtype of its own.

    Attributes:
        rule: a key of OPTIONS.
        dtype: of weights and gradients, a key of DTYPES.
        states: format of the states.
        list: the parameters.
        weights: how weights keep their precision.
    """

    rule: str
    dtype: str
    states: str
    list: ParamList
    weights: str = "native"

    @property
    def name(self) -> str:
        """What --cases matches."""
        weights = "" if self.weights == "native" else f"-{self.weights}"
        return f"{self.rule}/{self.dtype}{weights}/states-{self.states}/{self.list.name}"

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What tells cases apart, as in bench.results.case_key."""
        return self.rule, self.dtype, self.weights, self.states, self.list.name

    @property
    def bytes_per_element(self) -> float:
        """Of the formula, :func:`bytes_moved`."""
        dtype = DTYPES[self.dtype]
        extra = WEIGHT_FORMATS[self.weights].bytes(dtype)
        return bytes_moved(self.rule, dtype.itemsize, extra, STATE_FORMATS[self.states].bytes)

    @property
    def bytes(self) -> int:
        """Bytes that a step has to move, but for the step counters, the tables, and what the last
        block of a tensor has more than its share of a scale."""
        return round(self.list.numel * self.bytes_per_element)

    @property
    def beyond_cache(self) -> bool:
        """Whether a step finds nothing of the one before in a cache."""
        return self.bytes >= BEYOND_CACHE

    @property
    def samples(self) -> int:
        """How many steps are timed unless the user says otherwise."""
        if self.beyond_cache:
            return 15
        return 20 if len(self.list.shapes) > 5000 else 60
