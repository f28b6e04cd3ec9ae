"""The table of steps whose results are stored as digests: see :mod:`bench.digest`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

LISTS: dict[str, list[tuple[int, ...]]] = {
    "odd": [(0,), (), (1,), (3,), (31,), (33,), (7, 37), (1023,), (1025,)],
    "chunks": [(40_001,), (5,), (16_384,), (256, 33)],
    "many": [(1 + i % 67,) for i in range(300)],
    "rows": [(300, 64), (64,)],
    "strided": [(37, 7), (2, 5, 3, 4), (64, 33)],
}
"""Name -> shapes of the parameters. Those of "strided" are not contiguous. In "rows", 7 of 8 rows
have zero gradients, as in an embedding."""


@dataclass(frozen=True)
class DigestCase:
    """Some steps of one optimizer.

    Attributes:
        optimizer: name of the class in onepass.
        options: keyword arguments of the class, except those below.
        states, weights, param_dtype, grad_dtype: the formats and dtypes; "mixed" makes one group
            for each entry of STORED, and the dtype of the gradients changes from group to group.
        list: key of LISTS.
        steps: number of steps.
        seed: seed of the optimizer.
        infinite: steps, counted from 0, whose gradients have an infinite element.
        graph: on a GPU, capture the second step in a graph and replay the graph from then on.
    """

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    states: str = "fp32"
    weights: str = "native"
    param_dtype: str = "fp32"
    grad_dtype: str = "fp32"
    list: str = "odd"
    steps: int = 3
    seed: int = 7
    infinite: tuple[int, ...] = ()
    graph: bool = False

    @property
    def name(self) -> str:
        """The name of the case, unique in the table."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        weight = f"{self.param_dtype}+{self.weights}"
        extra = "".join(f" infinite@{i}" for i in self.infinite) + " graph" * self.graph
        stored = f"{weight} grad {self.grad_dtype} {self.states}"
        return f"{self.optimizer}({options}) {stored} {self.list} seed {self.seed}{extra}"


RULES: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9, "dampening": 0.25},
        {"momentum": 0.9, "nesterov": True},
    ],
    "Adagrad": [
        {
            "lr_decay": 0.01,
            "initial_accumulator_value": 0.1,
            "eps": 1e-3,
            "eps_in_sqrt": eps_in_sqrt,
        }
        for eps_in_sqrt in (False, True)
    ],
    "RMSprop": [
        {"momentum": momentum, "centered": centered, "eps_in_sqrt": eps_in_sqrt}
        for momentum, centered, eps_in_sqrt in itertools.product(
            (0.0, 0.9), (False, True), (False, True)
        )
    ],
    "Adam": [{"amsgrad": amsgrad} for amsgrad in (False, True)],
    "AdamW": [{"amsgrad": amsgrad} for amsgrad in (False, True)],
    "Lion": [{}],
    "NAdam": [{"momentum_decay": 0.1}],
    "AdEMAMix": [{"t_alpha": 4, "t_beta3": 3}],
    "AdamWScheduleFree": [{"warmup_steps": 2, "r": 0.5, "weight_lr_power": 1.5}],
}
"""Optimizer -> every combination of the options that select the formula of a kernel."""

STORED = [
    (NAMES[dtype], weights, states)
    for weights, form in WEIGHT_FORMATS.items()
    for dtype in form.codes
    for states in STATE_FORMATS
]
"""All combinations of (dtype of the weights, format of the weights, format of the states)."""

_BASE = {"lr": 0.01, "weight_decay": 0.1}
_CAUTIOUS = {"cautious_weight_decay": True, "decoupled_weight_decay": True}
_MOST = {
    "SGD": 1,
    "Adagrad": 1,
    "RMSprop": 4,
    "Adam": 1,
    "AdamW": 0,
    "Lion": 0,
    "NAdam": 0,
    "AdEMAMix": 0,
    "AdamWScheduleFree": 0,
}
"""Optimizer -> index in RULES of the options for tests of formats; every format supports them."""


def cases() -> list[DigestCase]:
    """The whole table; names are unique."""
    return [*_rules(), *_formats(), *_dtypes(), *_lists(), *_steps()]


def _rules() -> Iterator[DigestCase]:
    for optimizer, rows in RULES.items():
        for row, decoupled in itertools.product(rows, (False, True)):
            options = {**_BASE, **row, "decoupled_weight_decay": decoupled}
            yield DigestCase(optimizer, options)
        yield DigestCase(optimizer, {**_BASE, **rows[-1], "maximize": True})
    for optimizer in ("AdamW", "Lion", "NAdam"):
        for options in RULES[optimizer]:
            yield DigestCase(optimizer, {**_BASE, **options, **_CAUTIOUS})


def _options(optimizer: str) -> dict[str, Any]:
    return {**_BASE, **RULES[optimizer][_MOST[optimizer]]}


def _formats() -> Iterator[DigestCase]:
    for dtype, weights, states in STORED:
        yield DigestCase("AdamW", _BASE, states, weights, dtype, dtype, "chunks")
    for optimizer in (name for name in RULES if name != "AdamW"):
        for weights, states in (
            ("stochastic", "bf16"),
            ("split8", "mx8"),
            ("stochastic", "mx4"),
            ("master", "dynamic8"),
            ("split16", "mx8"),
        ):
            yield DigestCase(
                optimizer, _options(optimizer), states, weights, "bf16", "bf16", "chunks"
            )
    for weights, states in (("stochastic", "mx4"), ("split8", "mx8")):
        options = {**_BASE, **_CAUTIOUS}
        yield DigestCase("AdamW", options, states, weights, "bf16", "bf16", "chunks")
    yield DigestCase("Adam", {**_BASE, "amsgrad": True}, "mx8", list="chunks")
    yield DigestCase("AdamW", {**_BASE, "amsgrad": True}, "mx4", list="chunks")


def _dtypes() -> Iterator[DigestCase]:
    for param, grad in itertools.product(DTYPES, DTYPES):
        if param != grad:
            yield DigestCase("AdamW", _BASE, "mx8", param_dtype=param, grad_dtype=grad)


def _lists() -> Iterator[DigestCase]:
    reduced: dict[str, Any] = {
        "states": "mx8",
        "weights": "split8",
        "param_dtype": "bf16",
        "grad_dtype": "bf16",
    }
    for name in ("many", "rows", "strided"):
        yield DigestCase("AdamW", _BASE, list=name)
        yield DigestCase("AdamW", _BASE, **reduced, list=name)
        yield DigestCase("AdamW", _BASE, "mx4", "stochastic", "bf16", "bf16", name)
    for optimizer in RULES:
        yield DigestCase(
            optimizer, _options(optimizer), "mixed", "mixed", "mixed", "mixed", "odd", steps=2
        )


def _steps() -> Iterator[DigestCase]:
    """The step-wide options. Clipped cases use the infinity norm, which is exact."""
    formats: list[dict[str, Any]] = [
        {},
        {"states": "mx8", "weights": "split8", "param_dtype": "bf16", "grad_dtype": "bf16"},
        {"states": "mx4", "weights": "stochastic", "param_dtype": "bf16", "grad_dtype": "bf16"},
    ]
    for stored in formats:
        for clip in (0.5, 1e6):
            options = {**_BASE, "max_grad_norm": clip, "norm_type": math.inf}
            yield DigestCase("AdamW", options, **stored, list="chunks")
        options = {**_BASE, "skip_nonfinite": True}
        for infinite in ((0,), (1,), (0, 1)):
            yield DigestCase("AdamW", options, **stored, infinite=infinite)
        yield DigestCase("AdamW", {**_BASE, "zero_grads": True}, **stored)
        yield DigestCase("AdamW", {**_BASE, "ema_decay": 0.9}, **stored)
        if stored:
            yield DigestCase("AdamW", _BASE, **stored, seed=(1 << 40) + 3)
        yield DigestCase("AdamW", _BASE, **stored, steps=5, graph=True)
        yield DigestCase("AdamW", _BASE, **stored, infinite=(1,))  # not skipped
    for optimizer in ("SGD", "Lion", "NAdam", "AdEMAMix", "AdamWScheduleFree"):
        options = {**_options(optimizer), "skip_nonfinite": True}
        yield DigestCase(optimizer, options, infinite=(0,))
        yield DigestCase(optimizer, options, "mx8", infinite=(1,), steps=5, graph=True)
    clipped = {**_BASE, "max_grad_norm": 0.5, "norm_type": math.inf, "skip_nonfinite": True}
    yield DigestCase("AdamW", clipped, "mx8", list="many", infinite=(2,), steps=5, graph=True)
