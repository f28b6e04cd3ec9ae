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
TRAIL = 10  # steps of the animation's paths that are drawn in full colour
ZOOM = 0.07  # half the width of the enlarged part, as a fraction of the panel's
INSET = 0.42  # width of the enlarged part in the panel, as a fraction of the panel's


def _background(
    ax: Any,
    surface: Surface,
    labels: bool = True,
    box: tuple[float, float, float, float] | None = None,
) -> None:
    """Draws logarithmic contours in grey, because colours distinguish the paths."""
    left, right, bottom, top = box or surface.box
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


def _goal(surface: Surface, tracks: dict[str, Track]) -> tuple[float, float]:
    """The minimum at which most paths end."""
    minima = np.array(surface.minima)
    ends = np.array([_order(track)[-1] for track in tracks.values()])
    nearest = np.linalg.norm(ends[:, None] - minima, axis=2).argmin(1)
    x, y = minima[np.bincount(nearest, minlength=len(minima)).argmax()]
    return float(x), float(y)


def _enlarge(ax: Any, surface: Surface, tracks: dict[str, Track]) -> Any:
    """Adds axes that enlarge the neighbourhood of the minimum, in the corner with fewest points."""
    left, right, bottom, top = surface.box
    goal = _goal(surface, tracks)
    wide, high = ZOOM * (right - left), ZOOM * (top - bottom)
    box = (goal[0] - wide, goal[0] + wide, goal[1] - high, goal[1] + high)
    points = np.concatenate([_order(track) for track in tracks.values()] + [surface.minima])
    x = (points[:, 0] - left) / (right - left)
    y = (points[:, 1] - bottom) / (top - bottom)
    edge = 0.98 - INSET

    def crowded(corner: tuple[float, float]) -> int:
        inside_x = (x >= corner[0]) & (x <= corner[0] + INSET)
        return int((inside_x & (y >= corner[1]) & (y <= corner[1] + INSET)).sum())

    corner = min([(a, b) for a in (0.02, edge) for b in (0.02, edge)], key=crowded)
    inset = ax.inset_axes([*corner, INSET, INSET], zorder=6)
    _background(inset, surface, labels=False, box=box)
    inset.set(title="", xticks=[], yticks=[])
    inset.spines[["top", "right"]].set_visible(True)
    ax.indicate_inset_zoom(inset, edgecolor="black", alpha=0.7)
    return inset


def _moving(ax: Any, key: str, name: bool) -> tuple[Any, Any, Any]:
    """The whole path in a faint line, its last steps in full colour, and its end."""
    style = plots.line_style(key)
    (whole,) = ax.plot([], [], linewidth=0.7, color=style["color"], alpha=0.3)
    (trail,) = ax.plot([], [], linewidth=1.6, **(style if name else {**style, "label": "_"}))
    (head,) = ax.plot([], [], "o", color=style["color"], markersize=5, markeredgecolor="white")
    return whole, trail, head


def animate(path: Path, tracks: Tracks) -> None:
    """Writes an animated GIF of all algorithms; the time per frame increases.

    The last steps of each path are in full colour, and an inset enlarges the neighbourhood of the
    minimum, where the paths cross.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = max(len(t.points) for tracks_ in tracks.values() for t in tracks_.values())
    # Steps per frame increase, because the first steps are the longest.
    times = sorted({int(steps * (frame / (FRAMES - 1)) ** 1.7) for frame in range(FRAMES)})
    with pyplot.rc_context(plots.STYLE):
        figure, axes = pyplot.subplots(2, COLUMNS, figsize=(12, 8.2), dpi=72, layout="constrained")
        moving = []
        for surface, ax in _panels(axes):
            _background(ax, surface, labels=False)
            inset = _enlarge(ax, surface, tracks[surface.key])
            for key, track in tracks[surface.key].items():
                points = _order(track)
                moving += [(*_moving(a, key, a is ax), points) for a in (ax, inset)]
        _legend(figure, axes, columns=4)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        title = figure.text(0.02, 0.03, "", fontsize=11)
        canvas: Any = figure.canvas  # Agg's, which has the pixels
        frames = []
        for time in times:
            for whole, trail, head, points in moving:
                shown = points[: time + 1]
                whole.set_data(*shown.T)
                trail.set_data(*shown[-TRAIL - 1 :].T)
                head.set_data(*shown[-1:].T)
            title.set_text(f"step {min(time, steps - 1)}")
            canvas.draw()
            frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        pyplot.close(figure)
    plots.save_animation(path, frames)


def _legend(figure: Any, axes: Any, columns: int = 8) -> None:
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def files() -> list[str]:
    """The file names of the plots, one per algorithm."""
    return [f"path-{algorithm.key}.png" for algorithm in ALGORITHMS]
