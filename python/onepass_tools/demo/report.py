"""The output of the demo: a table, a plot and a JSON file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from onepass_tools.demo.train import Replay, Run, loss_deviation

HEADINGS = (
    "optimizer",
    "peak lr",
    "validation loss (nats/byte)",
    "optimizer ms/step",
    "state bytes/parameter",
    "seconds",
)
# The colour-blind-safe palette of Okabe and Ito. The line of torch is wide and pale, because it
# coincides with the line of onepass.AdamW.
STYLES: dict[str, tuple[str, Any, float]] = {
    "torch-adamw": ("#E69F00", "-", 4.0),
    "onepass-adamw": ("#000000", "--", 1.4),
    "onepass-adamw-bf16": ("#0072B2", ":", 1.8),
    "onepass-lion": ("#009E73", "-.", 1.5),
    "onepass-sgd": ("#CC79A7", "-", 1.5),
    "onepass-muon": ("#D55E00", (0, (5, 1)), 1.5),
}
SMOOTHING = 0.95
EARLY = 50


def rows(runs: list[Run]) -> list[tuple[str, ...]]:
    """Return one row of text per run, with columns in the order of HEADINGS."""
    return [
        (
            run.label,
            f"{run.lr:g}",
            f"{run.validation_loss[-1]:.4f}",
            f"{run.optimizer_ms:.3f}",
            f"{run.state_bytes_per_parameter:.2f}",
            f"{run.seconds:.1f}",
        )
        for run in runs
    ]


def print_table(runs: list[Run]) -> None:
    """Print the table: with rich on a terminal, else as aligned plain text."""
    body = rows(runs)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if index else "left")
        for row in body:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[index]) for row in [HEADINGS, *body]) for index in range(len(HEADINGS))]
    for row in [HEADINGS, tuple("-" * width for width in widths), *body]:
        first, *rest = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]))


def deviation(runs: list[Run]) -> dict[str, float]:
    """Return the largest training-loss difference of the first two runs, early and overall."""
    if len(runs) < 2:
        return {}
    early = {f"first {EARLY} steps": loss_deviation(runs[0], runs[1], EARLY)}
    return early | {"all steps": loss_deviation(runs[0], runs[1])}


def print_deviation(runs: list[Run], replay: Replay | None) -> None:
    """Print the measured differences between onepass.AdamW and torch.optim.AdamW."""
    if len(runs) < 2:
        return
    # Training is chaotic: runs that differ in one bit diverge and later converge again.
    lines = [
        (f"training loss, {steps}", f"{difference:.1e} nats/byte")
        for steps, difference in deviation(runs).items()
    ]
    if replay is not None:
        one, many = replay.one_step_max_difference, replay.max_difference
        lines += [
            (
                "weights, 1 step on the same gradients",
                f"{one:.1e} = {replay.one_step_in_lr:.1e} lr",
            ),
            (
                f"weights, {replay.steps} steps on the same gradients",
                f"{many:.1e} = {replay.relative_difference:.1e} of the largest update",
            ),
        ]
    print("\nlargest differences between onepass AdamW and torch AdamW, both in fp32")
    for what, value in lines:
        print(f"  {what:<40} {value}")


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average with bias correction."""
    smoothed, average = [], 0.0
    for index, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average / (1 - SMOOTHING**index))
    return smoothed


def draw(path: Path, runs: list[Run], title: str) -> None:
    """Plot the losses of all runs as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(8, 4.6), dpi=150, layout="constrained")
        shown: list[float] = []
        for run in runs:
            colour, line, width = STYLES[run.key]
            curve = smooth(run.train_loss)
            steps = range(1, len(curve) + 1)
            final = run.validation_loss[-1]
            axes.plot(
                steps,
                curve,
                color=colour,
                linestyle=line,
                linewidth=width,
                alpha=0.55 if width > 3 else 1.0,
                label=f"{run.label}: {final:.3f}",
            )
            axes.plot(
                run.validation_steps,
                run.validation_loss,
                linestyle="",
                marker="o",
                markersize=9 if width > 3 else 5,
                color=colour,
                alpha=0.55 if width > 3 else 1.0,
            )
            # The first steps are left out of the y range, because their losses are much larger.
            shown += curve[len(curve) // 15 :] + run.validation_loss
        shown = [value for value in shown if math.isfinite(value)]
        if shown:
            axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per byte)")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.legend(
            title="validation loss at the end\n(lines: training, smoothed; dots: validation)",
            title_fontsize=9,
            alignment="left",
            frameon=False,
        )
        figure.savefig(path)
        pyplot.close(figure)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write `content` as strict JSON; non-finite numbers become null."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", "utf-8")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
