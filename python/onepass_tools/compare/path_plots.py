"""Plots of paths over contours: one of all algorithms, one per algorithm, and an animation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from onepass_tools.compare import plots
from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.surfaces import SURFACES, Surface
from onepass_tools.compare.surfaces import Path as Track

Tracks = dict[str, dict[str, Track]]  # surface -> algorithm -> path
COLUMNS = 3
FRAMES = 60


def _background(ax: Any, surface: Surface, labels: bool = True) -> None:
    """Draws logarithmic contours in grey, because colours distinguish the paths."""
    left, right, bottom, top = surface.box
    x, y = np.meshgrid(np.linspace(left, right, 160), np.linspace(bottom, top, 160))
    height = np.log10(np.maximum(surface.f(x, y) - surface.lowest, 1e-2))
    ax.contour(x, y, height, 14, colors="#AAAAAA", linewidths=0.6, linestyles="solid")
    ax.plot(*surface.start, "s", color="black", markersize=6, markerfacecolor="white", zorder=5)
    for minimum in surface.minima:
        ax.plot(*minimum, "*", color="black", markersize=11, markerfacecolor="white", zorder=5)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_title(surface.label, fontsize=9)
    if labels:
        ax.set(xlabel="x", ylabel="y")


def _panels(axes: Any) -> list[tuple[Surface, Any]]:
    return list(zip(SURFACES, axes.flat, strict=True))


def _order(track: Track) -> np.ndarray[Any, Any]:
    """The points of a path before its first non-finite point."""
    ends = np.flatnonzero(~np.isfinite(track.points).all(1))
    return track.points[: ends[0] if len(ends) else None]


def draw_paths(path: Path, tracks: Tracks) -> None:
    """Draws the paths of all algorithms on each surface."""
    with plots.canvas(path, 2, COLUMNS, (13, 8.4)) as (figure, axes):
        for surface, ax in _panels(axes):
            _background(ax, surface)
            for key, track in tracks[surface.key].items():
                ax.plot(*_order(track).T, linewidth=1.4, **plots.line_style(key))
        _legend(figure, axes)


def draw_algorithm(path: Path, key: str, tracks: Tracks) -> None:
    """Draws one algorithm on each surface, with dots for steps, the rate and the final loss."""
    algorithm = BY_KEY[key]
    with plots.canvas(path, 2, COLUMNS, (10, 6.4)) as (figure, axes):
        for surface, ax in _panels(axes):
            _background(ax, surface)
            track = tracks[surface.key][key]
            points = _order(track)
            ax.plot(*points.T, "-", color="#0072B2", linewidth=1)
            ax.plot(*points.T, "o", color="#0072B2", markersize=2)
            ax.plot(*points[-1], "o", color="#D55E00", markersize=7)
            ends = track.losses[-1]
            text = "left" if not math.isfinite(ends) else f"loss {_short(ends)} at the end"
            ax.set_title(f"{surface.label}\nlr {track.lr:.2g}, {text}", fontsize=8.5)
        figure.suptitle(
            f"{algorithm.label}: {len(points) - 1} steps from the square; stars are minima, the "
            "orange dot is the end",
            fontsize=10,
        )


def _short(loss: float) -> str:
    return "below 1e-12" if loss < 1e-12 else f"{loss:.0e}"


def animate(path: Path, tracks: Tracks) -> None:
    """Writes an animated GIF of all algorithms; the time per frame increases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.animation import PillowWriter

    steps = max(len(t.points) for tracks_ in tracks.values() for t in tracks_.values())
    # Steps per frame increase, because the first steps are the longest.
    times = sorted({int(steps * (frame / (FRAMES - 1)) ** 1.7) for frame in range(FRAMES)})
    with pyplot.rc_context(plots.STYLE):
        figure, axes = pyplot.subplots(2, COLUMNS, figsize=(10, 6.8), dpi=72, layout="constrained")
        moving = []
        for surface, ax in _panels(axes):
            _background(ax, surface, labels=False)
            for key, track in tracks[surface.key].items():
                style = plots.line_style(key)
                (trail,) = ax.plot([], [], linewidth=1.3, **style)
                (head,) = ax.plot([], [], "o", color=style["color"], markersize=6)
                moving.append((trail, head, _order(track)))
        _legend(figure, axes, columns=4)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        title = figure.text(0.02, 0.03, "", fontsize=11)
        writer = PillowWriter(fps=8)
        with writer.saving(figure, str(path), dpi=72):
            for time in [*times, *[steps] * 8]:  # pause at the end
                for trail, head, points in moving:
                    trail.set_data(*points[: time + 1].T)
                    head.set_data(*points[: time + 1][-1:].T)
                title.set_text(f"step {min(time, steps - 1)}")
                writer.grab_frame()
        pyplot.close(figure)
    plots.shrink_animation(path)


def _legend(figure: Any, axes: Any, columns: int = 8) -> None:
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def files() -> list[str]:
    """The file names of the plots, one per algorithm."""
    return [f"path-{algorithm.key}.png" for algorithm in ALGORITHMS]
