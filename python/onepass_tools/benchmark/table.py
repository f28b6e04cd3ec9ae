"""Measurements as a plain-text table."""

from __future__ import annotations

from .cases import BEYOND_CACHE
from .timing import Outcome, Timed, percentile

LEGEND = (
    "ms: time of one step; GB/s: bytes of a step by the formula / p50; of copy: GB/s / that of "
    "copy_, empty if the buffers may stay in a cache; extra: additional memory during a step"
)
HEADER = (
    f"{'provider':<18} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'GB/s':>8} "
    f"{'of copy':>8} {'host us':>10} {'extra MB':>9}"
)


def row(one: Timed, copy_gbps: float) -> str:
    """The row of one provider or one limit."""
    ms = " ".join(f"{percentile(one.samples, p):>9.3f}" for p in (20, 50, 80))
    host = "" if one.host_us is None else f"{one.host_us:,.0f}"
    extra = "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.1f}"
    share = f"{one.gbps / copy_gbps:.3f}" if one.bytes >= BEYOND_CACHE else ""
    line = f"{one.provider:<18} {ms} {one.gbps:>8.2f} {share:>8} {host:>10} {extra:>9}"
    return line.rstrip()


def rows(outcome: Outcome) -> list[str]:
    """A row for each provider of a case, including providers with wrong results."""
    copy_gbps = next(one.gbps for one in outcome.timed if one.provider == "copy")
    found = [row(one, copy_gbps) for one in outcome.timed]
    return found + [f"{name:<18} not timed: {why}" for name, why in outcome.failed]
