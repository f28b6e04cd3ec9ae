"""Plots with matplotlib: stacked bars of reports, and memory timelines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .report import CATEGORIES, TITLES, MemoryReport
from .sizes import show

# The colour-blind-safe palette of Okabe and Ito. Hatches distinguish adjacent parts in black and
# white.
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "moments": "#E69F00",
    "companions": "#F0E442",
    "ema": "#CC79A7",
    "ring": "#009E73",
    "scratch": "#999999",
    "temporary": "#D55E00",
    "states": "#E69F00",
    "activations": "#009E73",
    "buffers": "#56B4E9",
    "gathered": "#999999",
}
_HATCHES = {
    "gradients": "//",
    "companions": "..",
    "ring": "xx",
    "gathered": "--",
    "buffers": "oo",
    "temporary": "\\\\",
}
_GB, _MB = 1000**3, 1000**2


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any, Any]]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'onepass[cli]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.5,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), dpi=150, layout="constrained")
        try:
            yield pyplot, figure, axes
        finally:
            pyplot.close(figure)


def draw_bars(
    path: str | os.PathLike[str],
    reports: Sequence[MemoryReport],
    title: str,
    limit: int | None = None,
) -> None:
    """Draws one bar per report, the first at the top, with measured bytes if available.

    Args:
        path: the file to write; the suffix selects the format.
        reports: the reports; reports without bytes are left out.
        title: the title of the plot.
        limit: a memory limit in bytes, drawn as a vertical line; None for no line.
    """
    shown = [(report, found) for report in reports if (found := report.bytes) is not None]
    largest = max([found.peak for _, found in shown] + [limit or 0], default=0)
    unit, word = (_GB, "GB") if largest >= _GB else (_MB, "MB")
    with _figure(8.4, 1.7 + 0.34 * len(shown)) as (_, figure, axes):
        rows = range(len(shown))
        left = [0.0] * len(shown)
        for category in CATEGORIES:
            widths = [getattr(found, category) / unit for _, found in shown]
            # Parts that are too thin to be visible are not in the legend.
            seen = max(widths, default=0.0) * unit > 0.003 * largest
            axes.barh(
                rows,
                widths,
                left=left,
                height=0.72,
                color=COLOURS[category],
                hatch=_HATCHES.get(category),
                edgecolor="white",
                linewidth=0.4,
                label=TITLES[category] if seen else None,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        _label_bars(axes, [found for _, found in shown], left, limit, largest / unit, unit)
        axes.set_yticks(list(rows), [report.label for report, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.85)
        # Leave room for the label after the longest bar.
        axes.set_xlim(0, largest / unit * (1.3 if any(f.host for _, f in shown) else 1.22))
        bare = not any(found.activations for _, found in shown)
        without = ", activations not included" if bare else ""
        axes.set_xlabel(f"{word} at the peak of the step{without}")
        axes.set_title(title, fontsize=10.5)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path)


def _label_bars(
    axes: Any,
    shown: Sequence[Any],
    ends: Sequence[float],
    limit: int | None,
    width: float,
    unit: int,
) -> None:
    """Writes the peak bytes after each bar, and draws the limit.

    Args:
        axes: the matplotlib axes.
        shown: the bytes of each bar.
        ends: the right end of each bar, in units.
        limit: the memory limit in bytes, or None.
        width: the length of the longest bar or the limit, in units.
        unit: the number of bytes per unit.
    """
    for row, (found, end) in enumerate(zip(shown, ends, strict=True)):
        away = f"  + {show(found.host)} on the host" if found.host else ""
        over = "  does not fit" if limit is not None and found.peak > limit else ""
        axes.text(
            end + width * 0.006,
            row,
            f"{show(found.peak)}{away}{over}",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    if limit is not None:
        axes.axvline(limit / unit, color="black", linestyle="--", linewidth=1, zorder=1.5)
        axes.annotate(
            f"{show(limit)} ",
            (limit / unit, -0.62),
            ha="right",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def draw_timeline(
    path: str | os.PathLike[str],
    seconds: Sequence[float],
    columns: Mapping[str, Sequence[int]],
    marks: Sequence[tuple[float, str]],
    titles: Mapping[str, str],
    title: str = "",
) -> None:
    """Draws the bytes of each category over time, stacked.

    Args:
        path: the file to write; the suffix selects the format.
        seconds: times of changes, ascending.
        columns: category -> bytes from each of these times on.
        marks: (seconds, label) pairs, drawn as labelled vertical lines.
        titles: category -> its title in the legend.
        title: the title of the plot; if empty, the title states the peak.
    """
    peak = max((sum(held) for held in zip(*columns.values(), strict=True)), default=0)
    unit, word = (_GB, "GB") if peak >= _GB else (_MB, "MB")
    with _figure(8.4, 4.4) as (_, figure, axes):
        shown = {name: held for name, held in columns.items() if max(held, default=0) > 0}
        axes.stackplot(
            seconds,
            *([value / unit for value in held] for held in shown.values()),
            labels=[titles[category] for category in shown],
            colors=[COLOURS[category] for category in shown],
            step="post",
            linewidth=0,
        )
        axes.margins(x=0)
        for moment, mark in marks:
            axes.axvline(moment, color="black", linewidth=0.6, alpha=0.6)
            axes.annotate(
                mark,
                (moment, 1),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
                ha="right",
                va="top",
            )
        axes.set_ylim(0, max(peak, 1) / unit * 1.1)
        axes.set_xlabel("seconds")
        axes.set_ylabel(f"{word} held")
        axes.set_title(title or f"peak {show(peak)}", fontsize=10.5)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.savefig(path)
