"""split8: a bfloat16 weight, and the next 8 bits of the fp32 value: a weight of 24 bits."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U16, U32
from .base import Stored, WeightFormat
from .floats import BF16_NAN
from .split import KEY, joined


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """(weight, low): the upper 24 bits of the value, the last rounded stochastically by the lower 8
    of the 16 random bits; low is a signed integer, as in split16."""
    bits = values.view(np.uint32)
    kept = (bits + (random & np.uint32(0xFF))) >> np.uint32(8)
    weight = ((kept + np.uint32(0x80)) >> np.uint32(8)).astype(np.uint16)
    low = (kept - (weight.astype(np.uint32) << np.uint32(8))).astype(np.uint8)
    nan = np.isnan(values)
    return np.where(nan, BF16_NAN, weight), np.where(nan, np.uint8(0), low)


def decode(weight: U16, low: U8, dtype: torch.dtype) -> F32:
    return joined(weight, low.view(np.int8).astype(np.int32) * np.int32(256))


FORMAT = WeightFormat(
    "split8",
    codes={torch.bfloat16: 13},
    encode=encode,
    decode=decode,
    key=KEY,
    companion=torch.int8,
    stochastic=True,
    # Word 0 is drawn for the states anyway. Its lowest 8 bits hardly decide how the state of slot 0
    # is rounded.
    random_half=0,
)
