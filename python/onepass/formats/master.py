"""master: a 16-bit weight and an fp32 master copy."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U16, U32
from .base import Stored, WeightFormat
from .floats import decode_float, encode_fp16, round_half_away


def rounded(values: F32, dtype: torch.dtype) -> U16:
    """Round master values to the weight dtype: fp16 ties to even, bf16 ties away from zero."""
    return encode_fp16(values) if dtype == torch.float16 else round_half_away(values)


def encode(values: F32, random: U32, dtype: torch.dtype) -> Stored:
    """Encode values as (rounded weight, master copy)."""
    return rounded(values, dtype), values


def decode(weight: U16, master: F32, dtype: torch.dtype) -> F32:
    """Returns the master value, or the weight if the weight differs from the rounded master.

    The master is then stale, because other weights were loaded into the model.
    """
    kept = rounded(master, dtype) == weight
    return np.where(kept, master, decode_float(weight, dtype))


FORMAT = WeightFormat(
    "master",
    codes={torch.bfloat16: 10, torch.float16: 11},
    encode=encode,
    decode=decode,
    key="weight_master",
    companion=torch.float32,
    starts_as_weight=True,
)
