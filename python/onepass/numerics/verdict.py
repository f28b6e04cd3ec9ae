"""What becomes of a step, in float64: clipping, unscaling, skipping. CUDA and Triton have the same
lines (csrc/verdict.h, triton_kernels/prologue.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Columns of a verdict, float64 [VERDICT_WIDTH].
FACTOR = 0  # what gradients are multiplied by
SKIP = 1  # 1 when nothing must change, else 0
NORM = 2  # of the gradients divided by the scale, before clipping
NONFINITE = 3  # gradients that are infinite or NaN
SKIPPED = 4  # steps skipped so far, this one included
SCALE = 5  # of the loss, which the gradients are multiplied with
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
        found: of numerics/gradient_norm.py: sum of squares, largest magnitude, count of non-finite
            elements; None where nothing was measured.
        scale: s, of the loss; None for 1.
        found_inf: not 0 skips the step, as torch.amp.GradScaler asks.
        max_norm: None clips nothing.
        largest: the norm is the largest magnitude, else the root of the sum of squares.
        skip_nonfinite: a non-finite gradient skips the step.
        skipped: steps skipped before this one.

    Returns:
        A row of VERDICT_WIDTH numbers. With a NaN among the gradients the norm is NaN, and so is
        the factor where something is to be clipped.
    """
    squares, top, nonfinite = map(np.float64, (0.0, 0.0, 0.0) if found is None else found)
    unit = np.float64(1.0 if scale is None else scale)
    with np.errstate(all="ignore"):
        # The largest magnitude passes over NaN; the sum of squares does not.
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
