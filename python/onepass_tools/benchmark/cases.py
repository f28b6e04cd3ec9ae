"""A case: rule x formats x parameter list, and the bytes that its step must move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from onepass import optim
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat
from onepass.optim.registry import classes
from onepass.rules import RULES

from .param_lists import ParamList

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Bytes, well above the size of a last-level cache; a step that moves less may run from the cache.
BEYOND_CACHE = 1 << 29

OPTIONS: dict[str, dict[str, Any]] = {
    rule.benchmark.optimizer: dict(rule.benchmark.options)
    for rule in RULES.values()
    if rule.benchmark is not None
}
"""The options of each measured class, by its name: in lower case for classes of onepass, and
``module:Class`` for others."""

_CUSTOM: dict[str, type[optim.Optimizer]] = {}


def add_class(name: str, made: type[optim.Optimizer]) -> None:
    """Adds a class that is not of onepass; it is measured with its default options."""
    _CUSTOM[name], OPTIONS[name] = made, {}


def class_of(rule: str) -> type[optim.Optimizer]:
    """The class for a key of OPTIONS."""
    return _CUSTOM[rule] if rule in _CUSTOM else classes()[rule]


@cache
def group_of(rule: str) -> Mapping[str, Any]:
    """A parameter group with the options of a key of OPTIONS."""
    param = torch.nn.Parameter(torch.empty(1, device="meta"))
    group = class_of(rule)([param], **OPTIONS[rule]).param_groups[0]
    return {name: value for name, value in group.items() if name != "params"}


@cache
def state_count(rule: str) -> int:
    """The number of state values per element for a key of OPTIONS."""
    found = class_of(rule).rule
    return len(found.state_slots(found.flag_bits(group_of(rule))))


def state_bytes(rule: str, form: StateFormat) -> float:
    """The bytes of all states per element for a key of OPTIONS, in a format of states."""
    found = class_of(rule).rule
    slots = found.state_slots(found.flag_bits(group_of(rule)))
    return sum(found.format_of(key, form).bytes for _, key in slots)


def bytes_moved(weight: int, extra: int, states: float) -> float:
    """Bytes that a step moves per element.

    A step reads and writes the weight, its companion and each state, and reads the gradient.

    Args:
        weight: bytes of a weight, and of its gradient.
        extra: bytes of the companion of a weight.
        states: bytes of all states.
    """
    return 2 * (weight + extra) + weight + 2 * states


@dataclass(frozen=True)
class Case:
    """One row of a benchmark; gradients have the dtype of the weights.

    A provider that is measured only as a comparison may use its own dtype.

    Attributes:
        rule: a key of OPTIONS.
        dtype: the dtype of weights and gradients, a key of DTYPES.
        states: the format of the states.
        list: the parameters.
        weights: the format of the weights.
    """

    rule: str
    dtype: str
    states: str
    list: ParamList
    weights: str = "native"

    @property
    def name(self) -> str:
        """The name that --cases matches."""
        weights = "" if self.weights == "native" else f"-{self.weights}"
        return f"{self.rule}/{self.dtype}{weights}/states-{self.states}/{self.list.name}"

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """The tuple that identifies a case, as in bench.results.case_key."""
        return self.rule, self.dtype, self.weights, self.states, self.list.name

    @property
    def bytes_per_element(self) -> float:
        """Bytes per element of a step, by :func:`bytes_moved`."""
        dtype = DTYPES[self.dtype]
        extra = WEIGHT_FORMATS[self.weights].bytes(dtype)
        states = state_bytes(self.rule, STATE_FORMATS[self.states])
        return bytes_moved(dtype.itemsize, extra, states)

    @property
    def bytes(self) -> int:
        """Bytes that a step must move.

        Step counters, tables and the partial last block of a tensor are not included.
        """
        return round(self.list.numel * self.bytes_per_element)

    @property
    def beyond_cache(self) -> bool:
        """Whether a step moves too many bytes to reuse cached data of the previous step."""
        return self.bytes >= BEYOND_CACHE

    @property
    def samples(self) -> int:
        """The default number of timed steps."""
        if self.beyond_cache:
            return 15
        return 20 if len(self.list.shapes) > 5000 else 60
