"""``python -m bench.gate FILE``: compares the ratios of a new run with those of committed runs.

For a case and another provider (or the copy), the ratio is its time divided by that of onepass in
the same run. Times differ between machines and days, ratios much less. The samples give each ratio
a range, from p20 / p80 to p80 / p20. A ratio has changed if its range does not overlap the
committed range. Only lines with exactly the same device name are compared.

Run this command before a release. It is not a test, because the result depends on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onepass_tools.benchmark.timing import LIMITS

from . import results
from .report_cases import OURS, newest
from .results import Line, case_key

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """The ratio of two providers' times: that of the other provider divided by that of onepass.

    Attributes:
        low, middle, high: the ratio p20 / p80, p50 / p50 and p80 / p20.
        versions: the versions of both providers.
    """

    low: float
    middle: float
    high: float
    versions: str

    @staticmethod
    def of(ours: Line, other: Line) -> Range:
        """The ratio of two lines; the time of a copy is scaled to the bytes of our line."""
        scale = ours["bytes"] / other["bytes"] if other["provider"] in LIMITS else 1.0
        mine, theirs = ours["ms"], other["ms"]
        return Range(
            scale * theirs["p20"] / mine["p80"],
            scale * theirs["p50"] / mine["p50"],
            scale * theirs["p80"] / mine["p20"],
            f"{ours['provider_version']} / {other['provider_version']}",
        )


@dataclass(frozen=True)
class Moved:
    """A ratio that has changed.

    Attributes:
        key: see :func:`ranges`.
        before, now: the ratio in the committed run and in the new one.
    """

    key: Key
    before: Range
    now: Range

    @property
    def worse(self) -> bool:
        """Whether onepass became slower relative to the other provider."""
        return self.now.middle < self.before.middle


def ranges(lines: Iterable[Line]) -> dict[Key, Range]:
    """(device, case..., onepass provider, other provider) -> ratio, from the newest lines.

    Both times of a ratio are from the same run.
    """
    groups: dict[Key, list[Line]] = {}
    for line in newest(list(lines)):
        groups.setdefault((line["device"], *case_key(line), line["date"]), []).append(line)
    found = {}
    for key, group in groups.items():
        for ours in (line for line in group if line["provider"].startswith(OURS)):
            for other in (line for line in group if not line["provider"].startswith(OURS)):
                pair: Key = (*key[:-1], ours["provider"], other["provider"])
                found[pair] = Range.of(ours, other)
    return found


def compare(committed: Iterable[Line], new: Iterable[Line]) -> tuple[int, list[Moved]]:
    """(number of ratios that both sets of lines have, the ratios that changed)."""
    before, now = ranges(committed), ranges(new)
    both = [key for key in now if key in before]
    moved = [
        Moved(key, before[key], now[key])
        for key in both
        if now[key].low > before[key].high or now[key].high < before[key].low
    ]
    return len(both), moved


def _row(moved: Moved) -> str:
    _, rule, dtype, weights, states, params, ours, other = moved.key
    name = f"{rule}/{dtype}{'' if weights == 'native' else '-' + weights}/states-{states}/{params}"
    versions = moved.now.versions
    if versions != moved.before.versions:
        versions = f"{moved.before.versions} -> {versions}"
    before, now = (f"{r.middle:.2f} ({r.low:.2f}-{r.high:.2f})" for r in (moved.before, moved.now))
    return (
        f"{'WORSE' if moved.worse else 'better'}  {name}: {other} over {ours} {before} -> {now}; "
        f"versions {versions}"
    )


def main(argv: list[str] | None = None) -> int:
    """Compares two sets of lines.

    Returns:
        0 if no ratio is worse; 1 if a ratio is worse; 2 on wrong usage or if there is nothing to
        compare.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate",
        description="Prints the ratios of a new run that differ from the committed ones.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="result lines of python -m bench --out FILE"
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=results.ROOT / "bench" / "results",
        metavar="DIR",
        help="folder of the committed lines (default bench/results)",
    )
    args = parser.parse_args(argv)
    if not args.file.is_file():
        parser.error(
            f"FILE {args.file} does not exist: write it with python -m bench --out {args.file}"
        )
    try:
        new = results.read(args.file)
        committed = [
            line
            for path in sorted(args.against.glob("*.jsonl"))
            if path.resolve() != args.file.resolve()
            for line in results.read(path)
        ]
    except ValueError as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return 2
    both, moved = compare(committed, new)
    if not both:
        devices = ", ".join(sorted({line["device"] for line in new})) or "no device"
        print(
            f"bench.gate: {args.against} has no case of {args.file} on {devices}", file=sys.stderr
        )
        return 2
    for one in sorted(moved, key=lambda one: not one.worse):
        print(_row(one))
    worse = sum(one.worse for one in moved)
    print(
        f"{both} ratios compared: {worse} worse, {len(moved) - worse} better, "
        f"{both - len(moved)} unchanged"
    )
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
