"""split8: a bfloat16 weight and the next 8 bits of the fp32 value, 24 bits in total."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U16, U32
from .base import Stored, WeightFormat
from .floats import BF16_NAN
from .split import KEY, joined


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode the upper 24 bits of values as (weight, low).

    The lowest 8 bits of fp32 are rounded stochastically with the lower 8 of the 16 random bits. low
    is a signed integer, as in split16.
    """
    bits = values.view(np.uint32)
    kept = (bits + (random & np.uint32(0xFF))) >> np.uint32(8)
    weight = ((kept + np.uint32(0x80)) >> np.uint32(8)).astype(np.uint16)
    low = (kept - (weight.astype(np.uint32) << np.uint32(8))).astype(np.uint8)
    nan = np.isnan(values)
    return np.where(nan, BF16_NAN, weight), np.where(nan, np.uint8(0), low)


def decode(weight: U16, low: U8, dtype: torch.dtype) -> F32:
    """Decode the result of :func:`encode` to fp32."""
    return joined(weight, low.view(np.int8).astype(np.int32) * np.int32(256))


FORMAT = WeightFormat(
    "split8",
    codes={torch.bfloat16: 13},
    encode=encode,
    decode=decode,
    key=KEY,
    companion=torch.int8,
    stochastic=True,
    # Word 0 is already generated for the states. Its lowest 8 bits have little influence on the
    # rounding of the state in slot 0.
    random_position=0,
)
