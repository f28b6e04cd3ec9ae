"""Means over seeds and their 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half of its 95 % confidence interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    quantile = T95[min(len(values) - 1, len(T95) - 1)]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """The text "mean ± half of the interval" for tables."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
