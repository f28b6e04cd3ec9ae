"""Plots of the line experiment and of the small models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.stats import interval
from onepass_tools.demo.report import smooth

STYLE: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
_NO_DITHER: Any = 0
BATCH_COLOURS = ("#000000", "#E69F00", "#0072B2")


@contextmanager
def canvas(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yields (figure, axes [rows, columns]) of ``size`` inches; saves to ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=size, dpi=110, layout="constrained", squeeze=False
        )
        try:
            yield figure, axes
            figure.savefig(path)
        finally:
            pyplot.close(figure)
    _shrink(path)


def _shrink(path: Path) -> None:
    """Reduces a PNG to 256 colours, a quarter of the bytes; the octree keeps rare colours."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=_NO_DITHER)
    small.save(path, optimize=True)


def save_animation(path: Path, frames: Sequence[np.ndarray[Any, Any]], ms: int = 125) -> None:
    """Writes a GIF with one palette for all frames instead of one each, a tenth of the bytes.

    Args:
        path: the file to write.
        frames: [height, width, 3] each, in bytes.
        ms: the time of a frame in milliseconds; the last one is shown for nine times as long.
    """
    from PIL import Image

    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())
    first, *rest = [
        Image.fromarray(frame).quantize(palette=palette, dither=_NO_DITHER) for frame in frames
    ]
    times = [ms] * len(rest) + [9 * ms]
    first.save(path, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)


def _palette() -> list[int]:
    """Red, green and blue of greys, and of each algorithm's colour in shades up to white."""
    found: list[int] = []
    for level in range(64):
        found += [round(level * 255 / 63)] * 3
    for algorithm in BY_KEY.values():
        for share in range(1, 9):
            for i in (1, 3, 5):
                found.append(round(255 + (int(algorithm.colour[i : i + 2], 16) - 255) * share / 8))
    return found


def line_style(key: str) -> dict[str, Any]:
    """The matplotlib line style of an algorithm."""
    algorithm = BY_KEY[key]
    return {"color": algorithm.colour, "linestyle": algorithm.line, "label": algorithm.label}


def draw_line(path: Path, experiment: dict[str, Any]) -> None:
    """Draws the loss curves, and the points with three fitted lines."""
    with canvas(path, 1, 2, (10, 4.6)) as (figure, axes):
        left, right = axes[0]
        for key, run in experiment["runs"].items():
            left.plot(run["loss"], linewidth=1.6, **line_style(key))
        left.axhline(experiment["floor"], color="black", linestyle=":", linewidth=1)
        left.set(yscale="log", xlabel="step", ylabel="mean squared error")
        left.set_title(f"losses, lr {experiment['lr']:g} for all")
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        left.grid(alpha=0.25)
        x = np.array(experiment["x"])
        right.plot(x, experiment["y"], "o", color="#999999", markersize=3, label="data")
        for key in ("momentum", "adamw", "adagrad"):
            slope, offset = experiment["runs"][key]["path"][-1]
            style = line_style(key)
            style["label"] += f": {slope:.3f} x + {offset:.3f}"
            # Two of the fitted lines coincide.
            width = {"momentum": 4.0, "adamw": 1.4}.get(key, 1.6)
            right.plot(x, slope * x + offset, linewidth=width, **style)
        right.set(xlabel="x", ylabel="y", title="data and fits after 100 steps")
        right.legend(frameon=False, fontsize=8.5)


def draw_batches(path: Path, batches: dict[str, Any]) -> None:
    """Draws the loss against the samples seen, for the three batch sizes."""
    with canvas(path, 1, 1, (7, 3.8)) as (_, axes):
        ax = axes[0, 0]
        order = list(zip(batches.items(), BATCH_COLOURS, strict=True))
        for rank, ((name, run), colour) in enumerate(reversed(order)):
            ax.plot(
                run["samples"],
                run["loss"],
                color=colour,
                linewidth=0.9 + 0.5 * rank,
                marker="o" if rank else None,
                markersize=3,
                label=f"{name} sample{'' if name.endswith(' 1') else 's'} a step",
            )
        ax.set(yscale="log", xlabel="samples seen", ylabel="mean squared error on all points")
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)


def draw_models(path: Path, tasks: dict[str, Any]) -> None:
    """Draws one row per task: training losses, rate sweep, generalisation gap and sharpness."""
    with canvas(path, len(tasks), 4, (15, 3.9 * len(tasks))) as (figure, axes):
        for row, (name, task) in zip(axes, tasks.items(), strict=True):
            curves, sweep, gaps, sharp = row
            unit = task["unit"]
            ends = []
            for key, found in task["rows"].items():
                curve = smooth([v if v is not None else math.nan for v in found["curve"]])
                curves.plot(range(1, len(curve) + 1), curve, linewidth=1.4, **line_style(key))
                losses = [_mean(values) for values in found["validation by rate"]]
                sweep.plot(found["rates"], losses, marker="o", markersize=3, **line_style(key))
                ends += [loss for loss in losses if math.isfinite(loss)]
            curves.axhline(task["target"], color="black", linestyle=":", linewidth=1)
            curves.set(xlabel="step", ylabel=f"training loss, smoothed ({unit})")
            curves.set_title(f"{name}: at the best rate (dotted: target)")
            sweep.set(xscale="log", xlabel="learning rate", ylabel=f"validation loss ({unit})")
            # Exclude diverged runs from the y range.
            sweep.set_ylim(min(ends) * 0.95, min(max(ends), 2.2 * min(ends) + 0.3))
            sweep.set_title(f"{name}: sweep of the rate")
            _dots(gaps, task, "gap", f"validation - train loss ({unit})")
            gaps.set_title(f"{name}: generalisation gap, 95 %")
            _dots(sharp, task, "sharpness", "largest eigenvalue of the Hessian")
            means = [_mean(found["sharpness"]) for found in task["rows"].values()]
            # One run in a sharp minimum makes an interval that includes 0.
            sharp.set_xscale("log", nonpositive="clip")
            sharp.set_xlim(left=min((m for m in means if m > 0), default=1) / 2)
            sharp.set_title(f"{name}: sharpness, 95 %")
            for ax in row:
                ax.grid(alpha=0.25)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)


def _mean(values: list[float | None]) -> float:
    return math.nan if None in values else interval([v for v in values if v is not None])[0]


def _dots(ax: Any, task: dict[str, Any], what: str, label: str) -> None:
    for place, algorithm in enumerate(reversed(ALGORITHMS)):
        mean, half = interval(task["rows"][algorithm.key][what])
        ax.errorbar(
            mean, place, xerr=half, fmt="o", color=algorithm.colour, capsize=3, markersize=5
        )
    ax.set_yticks(range(len(ALGORITHMS)), [a.label for a in reversed(ALGORITHMS)])
    ax.set_xlabel(label)
