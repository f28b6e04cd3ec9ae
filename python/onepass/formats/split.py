"""The split formats: a bfloat16 weight, and lower bits of the fp32 value as its companion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.arrays import F32, U16

KEY = "weight_low"


def joined(weight: U16, low: npt.NDArray[np.int32]) -> F32:
    """Returns the fp32 value with the bits 65536 * (bits of the weight) + low.

    No value encodes to a zero weight with a negative ``low``: the weight was set to zero later, and
    ``low`` is stale. A stale ``low`` is treated as 0, because the sum of the bits would be a NaN.
    """
    below = np.where(weight & np.uint16(0x7FFF) == 0, np.maximum(low, 0), low)
    bits = (weight.astype(np.uint32) << np.uint32(16)) + below.astype(np.uint32)
    return bits.view(np.float32)
