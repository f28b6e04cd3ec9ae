"""The global norm of gradients, in NumPy: the only result that may differ between backends."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .arrays import F32


def norm(grads: Iterable[F32]) -> npt.NDArray[np.float64]:
    """Returns float64 [3]: the sum of squares, the largest magnitude, the non-finite count.

    The square of an fp32 value is exact in float64 and does not overflow; the sums are rounded. The
    largest magnitude ignores NaN.
    """
    found = np.zeros(3)
    for grad in grads:
        magnitudes = np.abs(grad.astype(np.float64))
        largest = np.fmax.reduce(magnitudes, initial=0.0)
        nonfinite = np.count_nonzero(~np.isfinite(magnitudes))
        found[0] += np.sum(magnitudes * magnitudes)
        found[1:] = max(found[1], largest), found[2] + nonfinite
    return found
