"""native: weights and gradients in their torch dtype, rounded to nearest."""

from __future__ import annotations

import torch

from ..numerics.arrays import F32, U32
from .base import Array, Stored, WeightFormat
from .floats import decode_float, encode_float


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode values as (rounded weight, None)."""
    return encode_float(values, dtype), None


def decode(data: Array, companion: None, dtype: torch.dtype) -> F32:
    """Convert a weight or gradient to fp32; exact."""
    return decode_float(data, dtype)


FORMAT = WeightFormat(
    "native",
    codes={torch.float32: 0, torch.bfloat16: 1, torch.float16: 2},
    encode=encode,
    decode=decode,
)
