"""Memory reports as a table or as CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onepass.memory import Bytes, MemoryReport

HEADINGS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "companions": "master/split",
    "ema": "EMA",
    "ring": "ring",
    "scratch": "scratch",
    "temporary": "temporary",
}


def rows(reports: Sequence[MemoryReport], limit: int | None, reserve: int) -> list[tuple[str, ...]]:
    """The headings and one row per report, with separate columns for predicted and measured bytes.

    Empty columns are left out.
    """
    from onepass.memory.sizes import show

    def cell(value: Callable[[Bytes], str]) -> Callable[[MemoryReport], str]:
        return lambda r: "-" if r.predicted is None else value(r.predicted)

    def each(r: MemoryReport) -> str:
        return "-" if r.predicted is None else f"{r.predicted.peak / max(r.parameters, 1):.2f}"

    def left(r: MemoryReport) -> str:
        found = r.predicted
        if found is None or limit is None:
            return "-"
        over = found.peak + reserve - limit
        return f"no: {show(over)} over" if over > 0 else f"{show(limit - found.peak)} left"

    def difference(r: MemoryReport) -> str:
        value = r.difference()
        return "-" if value is None else f"{100 * value:+.2f} %"

    columns: list[tuple[str, Callable[[MemoryReport], str]]] = [("optimizer", lambda r: r.name)]
    known = [r.predicted for r in reports if r.predicted is not None]
    for name, heading in HEADINGS.items():
        if any(getattr(found, name) for found in known):
            columns.append((heading, cell(partial(_shown, name))))
    columns += [("peak", cell(lambda b: show(b.peak))), ("B/param", each)]
    if any(found.host for found in known):
        columns.append(("on the host", cell(lambda b: show(b.host))))
    if limit is not None:
        columns.append((f"fits {show(limit)}", left))
    if any(r.measured is not None for r in reports):
        columns += [
            ("measured", lambda r: "-" if r.measured is None else show(r.measured.peak)),
            ("difference", difference),
        ]
    if any(r.process_peak is not None for r in reports):
        columns.append(
            ("process grew", lambda r: "-" if r.process_peak is None else show(r.process_peak))
        )
    return [tuple(h for h, _ in columns), *(tuple(f(r) for _, f in columns) for r in reports)]


def _shown(name: str, found: Bytes) -> str:
    from onepass.memory.sizes import show

    return show(getattr(found, name))


def print_rows(body: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """Print a table; the first row is the headings. rich is used on a terminal, else plain text."""
    head, *rest = body
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for index, heading in enumerate(head):
                table.add_column(heading, justify="left" if index in left else "right")
            for row in rest:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(len(row[index]) for row in body) for index in range(len(head))]
    for row in [head, tuple("-" * width for width in widths), *rest]:
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def as_csv(reports: Sequence[MemoryReport]) -> str:
    """CSV with one line per report: predicted and measured bytes; missing values are empty."""
    from onepass.memory import Bytes

    names = [*(f.name for f in fields(Bytes)), "held", "peak"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    which = ("predicted", "measured")
    head = ["name", "parameters", "device", *(f"{w}_{n}" for w in which for n in names)]
    writer.writerow([*head, "process_peak", "problem"])
    for report in reports:
        line: list[Any] = [report.name, report.parameters, report.device]
        for w in which:
            found = getattr(report, w)
            line += ["" if found is None else getattr(found, n) for n in names]
        line += ["" if report.process_peak is None else report.process_peak, report.problem]
        writer.writerow(line)
    return out.getvalue()
