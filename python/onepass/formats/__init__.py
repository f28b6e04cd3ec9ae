"""The table of formats: how tensors rest in memory, and by which number kernels know it.

The numbers are those of ``csrc/formats/table.h``; docs/formats.md describes the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ABSENT = -1  # in place of a format's number: the rule has no such state

# Written into every checkpoint; one more whenever the codes of a format change.
# 2: those of mx4 have another meaning. 3: those of mx4 are int8 in place of uint8, so that dtypes
# tell every format. No other format has changed.
VERSION = 3


def readable(version: int, states: str) -> bool:
    """Whether codes that a checkpoint has of a version mean what they do now.

    Args:
        version: the group's "format_version".
        states: the format of its states.
    """
    return version in (2, VERSION) or (version == 1 and states != "mx4")


@dataclass(frozen=True)
class StateFormat:
    """A format of optimizer states.

    Attributes:
        name: what users ask for.
        code: its number.
        dtype: of the tensor of codes, which has the parameter's shape and strides unless codes are
            packed. No two formats have the same dtypes of codes and of scales.
        stochastic: whether it draws random bits.
        block: elements, in memory order, that share a scale; 1 for none.
        scale: dtype of the scales, a tensor [ceil(numel / block)] beside the codes.
        packed: codes in one byte; with more than one the codes are [ceil(numel / packed)].
    """

    name: str
    code: int
    dtype: torch.dtype
    stochastic: bool = False
    block: int = 1
    scale: torch.dtype | None = None
    packed: int = 1

    @property
    def bytes(self) -> float:
        """Bytes of a stored value, its share of a scale included, in a long tensor."""
        scale = self.scale.itemsize / self.block if self.scale else 0.0
        return self.dtype.itemsize / self.packed + scale


@dataclass(frozen=True)
class WeightFormat:
    """How a weight of 16 bits keeps its precision.

    Attributes:
        name: what users ask for.
        codes: its number for each dtype of a weight that it serves.
        key: of the companion tensor in the parameter's state, of the parameter's shape and strides;
            empty for none.
        companion: dtype of it, None for the weight's own.
        stochastic: whether it draws random bits.
    """

    name: str
    codes: dict[torch.dtype, int] = field(hash=False)
    key: str = ""
    companion: torch.dtype | None = None
    stochastic: bool = False

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the companion of one weight."""
        return (self.companion or dtype).itemsize if self.key else 0


NATIVE: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Weights and gradients as torch made them, rounded to nearest."""

_BF16, _FP16 = torch.bfloat16, torch.float16

STATE_FORMATS: dict[str, StateFormat] = {
    f.name: f
    for f in (
        StateFormat("fp32", 0, torch.float32),
        StateFormat("bf16", 3, torch.bfloat16, stochastic=True),
        StateFormat("mx8", 5, torch.uint8, stochastic=True, block=32, scale=torch.uint8),
        StateFormat("mx4", 6, torch.int8, stochastic=True, block=32, scale=torch.uint8, packed=2),
        StateFormat("dynamic8", 7, torch.uint8, block=256, scale=torch.float32),
    )
}

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("native", NATIVE),
        WeightFormat("stochastic", {_BF16: 3, _FP16: 4}, stochastic=True),
        WeightFormat("kahan", {_BF16: 8, _FP16: 9}, "weight_compensation"),
        WeightFormat("master", {_BF16: 10, _FP16: 11}, "weight_master", torch.float32),
        WeightFormat("split16", {_BF16: 12}, "weight_low", torch.int16),
        WeightFormat("split8", {_BF16: 13}, "weight_low", torch.int8, stochastic=True),
    )
}


def scale_key(key: str) -> str:
    """The state key of the scales of a state."""
    return f"{key}_scale"
