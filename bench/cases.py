"""The cases: rule x states x parameter list, and the bytes that a step of each has to move."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .lists import ParamList, gpt2, many, one

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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


@dataclass(frozen=True)
class Case:
    """One row of the benchmark; gradients have the dtype of the weights.

    A provider that is there for comparison may have a dtype of its own.

    Attributes:
        rule: a key of OPTIONS.
        dtype: of weights and gradients, "fp32" or "bf16".
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
        """What tells cases apart, as in results.case_key."""
        return self.rule, self.dtype, self.weights, self.states, self.list.name

    @property
    def bytes_per_element(self) -> float:
        """Weight and companion read and written, gradient read, each state read and written."""
        dtype = DTYPES[self.dtype]
        kept = dtype.itemsize + WEIGHT_FORMATS[self.weights].bytes(dtype)
        return 2 * kept + dtype.itemsize + STATES[self.rule] * 2 * STATE_FORMATS[self.states].bytes

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


def all_cases(quick: bool = False) -> list[Case]:
    """Every case; quick has them all at a fraction of the size, to try the benchmark itself."""
    big = one(1 if quick else 50)
    few, lots = (200, 500) if quick else (2000, 20_000)
    lists = [
        many(few, 256),
        many(lots, 256),
        many(300, 1),
        many(lots, 1),
        many(300, 4096),
        many(300, 4096, offset=1),
        gpt2(2, 64, 1000, 64) if quick else gpt2(12, 768, 50257, 1024),
    ]
    return [
        Case("adamw", "fp32", "fp32", big),
        Case("adamw", "bf16", "bf16", big),
        Case("adamw", "bf16", "fp32", big),
        Case("adamw", "fp32", "mx8", big),
        Case("adamw", "bf16", "mx8", big, "split8"),
        Case("adamw", "bf16", "mx8", big, "stochastic"),
        Case("adamw", "bf16", "mx4", big, "stochastic"),
        Case("adamw", "fp32", "dynamic8", big),
        Case("lion", "fp32", "fp32", big),
        Case("sgd", "fp32", "fp32", big),
        Case("adagrad", "fp32", "fp32", big),
        Case("rmsprop", "fp32", "fp32", big),
        *(Case("adamw", "fp32", "fp32", params) for params in lists),
    ]


def select(cases: list[Case], pattern: str | None) -> list[Case]:
    """The cases whose name contains the pattern, or matches it if it has wildcards."""
    if pattern is None:
        return cases
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return [case for case in cases if fnmatch(case.name, pattern)]
