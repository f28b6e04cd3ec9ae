"""The table of formats: how tensors rest in memory, and by which number kernels know it.

The numbers are those of ``csrc/formats/table.h``; the codes themselves are specified in
:mod:`onepass.reference` and described in docs/formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ABSENT = -1  # in place of a format's number: the rule has no such state


@dataclass(frozen=True)
class StateFormat:
    """A format of optimizer states: code for the kernels, dtype and bytes of a stored value."""

    code: int
    dtype: torch.dtype
    bytes: float
    stochastic: bool


STATE_FORMATS: dict[str, StateFormat] = {
    "fp32": StateFormat(0, torch.float32, 4, False),
    "bf16": StateFormat(3, torch.bfloat16, 2, True),
}

# Weights and gradients rest as torch made them, rounded to nearest.
WEIGHT_FORMATS: tuple[str, ...] = ("native",)
NATIVE: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
