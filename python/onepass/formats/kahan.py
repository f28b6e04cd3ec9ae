"""kahan: a 16-bit weight, and its rounding error as a second number of the same dtype."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U16, U32
from .base import Stored, WeightFormat
from .floats import decode_float, encode_float


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode values as (weight, compensation), each rounded to nearest.

    The compensation of an infinite or NaN weight is 0.
    """
    weight = encode_float(values, dtype)
    near = decode_float(weight, dtype)
    with np.errstate(invalid="ignore"):  # infinity minus itself
        rest = np.where(np.isfinite(near), values - near, np.float32(0))
    return weight, encode_float(rest, dtype)


def decode(weight: U16, compensation: U16, dtype: torch.dtype) -> F32:
    """Returns weight + compensation in fp32."""
    return decode_float(weight, dtype) + decode_float(compensation, dtype)


FORMAT = WeightFormat(
    "kahan",
    codes={torch.bfloat16: 8, torch.float16: 9},
    encode=encode,
    decode=decode,
    key="weight_compensation",
)
