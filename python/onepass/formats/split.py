"""The split formats: a bfloat16 weight, and beside it lower bits of the fp32 value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.arrays import F32, U16

KEY = "weight_low"


def joined(weight: U16, low: npt.NDArray[np.int32]) -> F32:
    """The value whose bits are 65536 times those of the weight, plus low.

    A negative remainder under a zero weight is stale, since no value encodes to it: the weight was
    set to zero later. It is treated as 0; the sum of the bits would be a NaN.
    """
    below = np.where(weight & np.uint16(0x7FFF) == 0, np.maximum(low, 0), low)
    bits = (weight.astype(np.uint32) << np.uint32(16)) + below.astype(np.uint32)
    return bits.view(np.float32)
