"""The verdict on a step, in float64: clip the gradients, unscale them, or skip the step.

CUDA and Triton implement the same lines (csrc/verdict.h, triton_kernels/prologue.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Columns of a verdict, float64 [VERDICT_WIDTH].
FACTOR = 0  # the factor of the gradients
SKIP = 1  # 1 if the step is skipped, else 0
NORM = 2  # norm of the unscaled gradients, before clipping
NONFINITE = 3  # number of gradient elements that are infinite or NaN
SKIPPED = 4  # number of steps skipped so far, including this one
SCALE = 5  # loss scale, by which the gradients are multiplied
VERDICT_WIDTH = 6

TINY = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


def judge(
    found: Sequence[float] | None,
    scale: float | None,
    found_inf: float | None,
    max_norm: float | None,
    largest: bool,
    skip_nonfinite: bool,
    skipped: float,
) -> list[float]:
    """The verdict on a step.

    .. math::
        n = \\lVert g \\rVert / s, \\qquad f = \\min(1, n_{max} / (n + 10^{-6})) / s

    Args:
        found: the result of ``norm`` in numerics/gradient_norm.py: sum of squares, largest
            magnitude, number of non-finite elements. None if the norm was not computed.
        scale: the loss scale s; None for 1.
        found_inf: the ``found_inf`` of torch.amp.GradScaler; a value other than 0 skips the step.
        max_norm: the largest norm without clipping; None disables clipping.
        largest: use the largest magnitude as the norm instead of the 2-norm.
        skip_nonfinite: skip the step if a gradient is not finite.
        skipped: the number of steps skipped before this one.

    Returns:
        A row of VERDICT_WIDTH numbers. If a gradient is NaN, the norm is NaN; the factor is also
        NaN if clipping is enabled.
    """
    squares, top, nonfinite = map(np.float64, (0.0, 0.0, 0.0) if found is None else found)
    unit = np.float64(1.0 if scale is None else scale)
    with np.errstate(all="ignore"):
        # The largest magnitude ignores NaN; the sum of squares propagates it.
        norm = (top if squares == squares else squares) if largest else np.sqrt(squares)
        norm = norm / unit
        coefficient = np.float64(1.0)
        if max_norm is not None:
            coefficient = np.float64(max_norm) / (norm + TINY)
            if coefficient > 1.0:
                coefficient = np.float64(1.0)
        factor = coefficient / unit
    skip = (found_inf is not None and found_inf != 0) or (skip_nonfinite and nonfinite != 0)
    numbers = (factor, skip, norm, nonfinite, skipped + skip, unit)
    return [float(number) for number in numbers]
