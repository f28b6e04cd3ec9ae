"""stochastic: 16-bit weights rounded up with the probability of the dropped bits."""

from __future__ import annotations

import torch

from ..numerics.arrays import F32, U16, U32
from .base import Stored, WeightFormat
from .floats import decode_float, encode_bf16_stochastic, encode_fp16_stochastic


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    if dtype == torch.float16:
        return encode_fp16_stochastic(values, random), None
    return encode_bf16_stochastic(values, random), None


def decode(data: U16, companion: None, dtype: torch.dtype) -> F32:
    return decode_float(data, dtype)


FORMAT = WeightFormat(
    "stochastic",
    codes={torch.bfloat16: 3, torch.float16: 4},
    encode=encode,
    decode=decode,
    stochastic=True,
)
