"""The rules: one file per algorithm, with the whole Python definition of that algorithm.

Every file in this folder that defines ``RULE`` is a rule. csrc/rules and triton_kernels/rules.py
implement the same formulas under the same names. CONTRIBUTING.md describes how to add a rule.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import limits
from .base import (
    DECOUPLED,
    DECOUPLED_DECAY,
    EMA,
    EMA_DECAY,
    HYPER_WIDTH,
    LR,
    OPTIONS_WIDTH,
    OWN,
    SIGN,
    WEIGHT_DECAY,
    Flag,
    Rule,
    ScalarState,
    Slot,
    StepOf,
    decay,
    power,
)
from .custom import Option
from .limits import MAX_SCALAR_STATES, MAX_STATES

__all__ = [
    "CODES",
    "DECOUPLED",
    "DECOUPLED_DECAY",
    "EMA",
    "EMA_DECAY",
    "HYPER_WIDTH",
    "LAYOUT",
    "LR",
    "MAX_SCALAR_STATES",
    "MAX_STATES",
    "OPTIONS_WIDTH",
    "OWN",
    "RULES",
    "SIGN",
    "WEIGHT_DECAY",
    "Flag",
    "Option",
    "Rule",
    "ScalarState",
    "Slot",
    "StepOf",
    "decay",
    "power",
]


def _found() -> dict[str, Rule]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f".{name}", __name__) for name in names]
    rules = [module.RULE for module in modules if hasattr(module, "RULE")]
    return {rule.name: rule for rule in rules}


RULES: dict[str, Rule] = _found()
"""The rules by name, in alphabetical order. A compiled library identifies a rule by its position
here, its code."""

CODES: dict[str, int] = {name: code for code, name in enumerate(RULES)}

LAYOUT = " ".join(
    [*RULES, *(f"{name}={value}" for name, value in vars(limits).items() if name[:4] == "MAX_")]
)
"""Identifies the meaning of the numbers in a plan. A compiled library must have the same layout
(csrc/generate.py)."""
