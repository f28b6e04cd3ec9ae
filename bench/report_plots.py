"""The pictures of the pages of devices: the time of a step with each library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onepass_tools.benchmark.cases import BEYOND_CACHE

from .plot_styles import colour
from .report_cases import cases_of, ours_of, per_billion, steps, title
from .results import Line


def draw(lines: list[Line], path: Path) -> bool:
    """Draws the time of a step, with a panel for each case and a line for each provider.

    Each provider has a line of its own, so that no point hides another.

    Args:
        lines: the newest lines of one device.
        path: the PNG file to write.

    Returns:
        False, and nothing is written, if no case with several providers leaves the caches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Cases that stay in a cache, or consist of host time only, do not scale with the parameters;
    # cases with one provider compare nothing.
    cases = [
        case
        for case in cases_of(lines)
        if len(steps(case)) > 1 and any(x["bytes"] >= BEYOND_CACHE for x in steps(case))
    ]
    if not cases:
        return False
    heights = [len(steps(case)) + 1.9 for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(6.5, 0.23 * sum(heights) + 0.8),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for case, panel in zip(cases, axes[:, 0], strict=True):
        _panel(panel, case)
    every = [per_billion(line) for case in cases for line in steps(case)]
    axes[0, 0].set_xlim(min(every) / 1.5, max(every) * 3)
    figure.supxlabel(
        "median in milliseconds per billion parameters, log scale; left is faster\n"
        "dashed: the bytes of onepass's step at the bandwidth of copy_",
        fontsize=9,
    )
    figure.suptitle(f"Time of one optimizer step: {lines[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(axes: Any, case: list[Line]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ordered = steps(case)
    names = [line["provider"] for line in ordered]
    for row, line in enumerate(ordered):
        ours = line["provider"].startswith("onepass-")
        time = per_billion(line)
        axes.plot(
            time, row, marker="o" if ours else "s", color=colour(line["provider"]), markersize=6
        )
        axes.annotate(
            f"{time:,.0f}" if time >= 99.5 else f"{time:.1f}",
            (time, row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if ours else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    if (step := ours_of(case)) is not None:
        limit = 1e3 * step["bytes"] / step["numel"] / step["copy_gbps"]
        axes.axvline(limit, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name.startswith("onepass-") else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title(case[0]), fontsize=9, loc="left")
    axes.grid(axis="x", color="0.92")
    axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
