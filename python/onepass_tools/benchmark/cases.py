"""A case: rule x formats x parameter list, and the bytes that a step of it has to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .lists import ParamList

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Well beyond a shared last-level cache; what moves less per step may stay in it.
BEYOND_CACHE = 1 << 29

# The learning rates are large so that two steps change weights by far more than their rounding:
# check.py would not notice a step that does nothing otherwise.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "lion": {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 1e-2},
    "sgd": {"lr": 1e-1, "momentum": 0.9},
    "adagrad": {"lr": 1e-2, "eps": 1e-10},
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8},
}
STATES = {"adamw": 2, "lion": 1, "sgd": 1, "adagrad": 1, "rmsprop": 1}
"""Values that a rule keeps per element, with the options above."""
CLASSES = {
    "adamw": "AdamW",
    "lion": "Lion",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
}


def bytes_moved(rule: str, weight: int, extra: int, state: float) -> float:
    """Bytes of a step per element: weight and companion read and written, gradient read, each state
    read and written.

    Args:
        rule: a key of STATES.
        weight: bytes of a weight, and of its gradient.
        extra: of what is kept beside a weight.
        state: of one value of a state.
    """
    return 2 * (weight + extra) + weight + STATES[rule] * 2 * state


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
