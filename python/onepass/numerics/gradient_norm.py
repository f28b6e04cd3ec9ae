"""The global norm of gradients, in NumPy: the one result that backends may differ in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .arrays import F32


def norm(grads: Iterable[F32]) -> npt.NDArray[np.float64]:
    """Of all elements, float64 [3]: sum of squares, largest magnitude, count of non-finite ones.

    Squares are exact in float64 and none overflows; the sums are rounded. The largest magnitude
    passes over NaN.
    """
    found = np.zeros(3)
    for grad in grads:
        magnitudes = np.abs(grad.astype(np.float64))
        largest = np.fmax.reduce(magnitudes, initial=0.0)
        nonfinite = np.count_nonzero(~np.isfinite(magnitudes))
        found[0] += np.sum(magnitudes * magnitudes)
        found[1:] = max(found[1], largest), found[2] + nonfinite
    return found
