"""stochastic: 16-bit weights with unbiased stochastic rounding."""

from __future__ import annotations

import torch

from ..numerics.arrays import F32, U16, U32
from .base import Stored, WeightFormat
from .floats import decode_float, encode_bf16_stochastic, encode_fp16_stochastic


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode values as (stochastically rounded weight, None)."""
    if dtype == torch.float16:
        return encode_fp16_stochastic(values, random), None
    return encode_bf16_stochastic(values, random), None


def decode(data: U16, companion: None, dtype: torch.dtype) -> F32:
    """Convert a weight to fp32; exact."""
    return decode_float(data, dtype)


FORMAT = WeightFormat(
    "stochastic",
    codes={torch.bfloat16: 3, torch.float16: 4},
    encode=encode,
    decode=decode,
    stochastic=True,
)
