"""fp32: states in the precision of the computation."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U32
from .base import Moment, StateFormat, Stored


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """Returns (values, None)."""
    return values, None


def decode(data: F32, scales: None, count: int, moment: Moment) -> F32:
    """Returns a copy of the values."""
    return np.array(data, np.float32)


FORMAT = StateFormat("fp32", code=0, dtype=torch.float32, encode=encode, decode=decode)
