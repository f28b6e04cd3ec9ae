"""split16: a bfloat16 weight, and the lower 16 bits of the fp32 value."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U16, U32
from .base import Stored, WeightFormat
from .floats import round_half_away
from .split import KEY, joined


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode values as (weight, low).

    The bits of a value are 65536 * (bits of the weight) + low, with low as a signed integer. The
    encoding is exact except for the payload of a NaN.
    """
    weight = round_half_away(values)
    low = values.view(np.uint32) - (weight.astype(np.uint32) << np.uint32(16))
    return weight, np.where(np.isnan(values), np.uint16(0), low.astype(np.uint16))


def decode(weight: U16, low: U16, dtype: torch.dtype) -> F32:
    """Decode the result of :func:`encode` to fp32."""
    return joined(weight, low.view(np.int16).astype(np.int32))


FORMAT = WeightFormat(
    "split16",
    codes={torch.bfloat16: 12},
    encode=encode,
    decode=decode,
    key=KEY,
    companion=torch.int16,
)
