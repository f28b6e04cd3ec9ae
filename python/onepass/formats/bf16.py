"""bf16: states as bfloat16, rounded stochastically."""

from __future__ import annotations

import torch

from ..numerics.arrays import F32, U16, U32
from .base import Moment, StateFormat, Stored
from .floats import decode_bf16, encode_bf16_stochastic


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """Encode values as (bfloat16 codes, None), rounded stochastically."""
    return encode_bf16_stochastic(values, random), None


def decode(data: U16, scales: None, count: int, moment: Moment) -> F32:
    """Decode the codes of :func:`encode`; exact."""
    return decode_bf16(data)


FORMAT = StateFormat(
    "bf16", code=3, dtype=torch.bfloat16, encode=encode, decode=decode, stochastic=True
)
