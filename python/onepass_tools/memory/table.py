"""Memory reports as a table or as CSV."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onepass.memory import Bytes, MemoryReport

HEADINGS = {
    "weights": "weights",
    "buffers": "buffers",
    "gradients": "gradients",
    "moments": "moments",
    "companions": "master/split",
    "ema": "EMA",
    "ring": "ring",
    "gathered": "gathered",
    "activations": "activations",
    "scratch": "scratch",
    "temporary": "temporary",
}
DETAILS = (
    "process grew",
    "buffers",
    "temporary",
    "scratch",
    "ring",
    "EMA",
    "weights",
    "gradients",
    "master/split",
    "moments",
    "gathered",
    "activations",
    "on the host",
    "B/param",
    "difference",
)
"""The columns that a narrow table leaves out, the first of these first."""


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
        room = limit - reserve
        if found.peak > room:
            return f"no: {show(found.peak - room)} over {show(room)}"
        return f"{show(room - found.peak)} left"

    def difference(r: MemoryReport) -> str:
        value = r.difference()
        return "-" if value is None else f"{100 * value:+.2f} %"

    def marked(r: MemoryReport) -> str:
        return f"{r.name} *" if r.by_formula else r.name

    def measured(r: MemoryReport) -> str:
        return "not run" if r.measured is None else show(r.measured.peak)

    columns: list[tuple[str, Callable[[MemoryReport], str]]] = [("optimizer", marked)]
    known = [r.predicted for r in reports if r.predicted is not None]
    for name, heading in HEADINGS.items():
        if any(getattr(found, name) for found in known):
            columns.append((heading, cell(partial(_shown, name))))
    columns.append(("peak", cell(lambda b: show(b.peak))))
    if limit is not None:
        columns.append((f"fits {show(limit - reserve)}", left))
    columns.append(("B/param", each))
    if any(found.host for found in known):
        columns.append(("on the host", cell(lambda b: show(b.host))))
    if any(r.measured is not None for r in reports):
        columns += [
            ("measured", measured),
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


def columns_of_output() -> int | None:
    """The width of stdout: of the terminal, else COLUMNS; None for a pipe without COLUMNS."""
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    told = os.environ.get("COLUMNS", "")
    return int(told) if told.isdigit() and int(told) else None


def fitted(
    body: Sequence[Sequence[str]], width: int | None
) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table without the columns that do not fit, and the headings of these columns.

    Columns are dropped in the order of DETAILS. The names, the peak and what is left remain.
    """
    head, dropped = list(body[0]), []
    for detail in DETAILS:
        shown = [i for i, heading in enumerate(head) if heading not in dropped]
        used = sum(max(len(row[i]) for row in body) + 2 for i in shown)
        if width is None or used - 2 <= width:
            break
        if detail in head:
            dropped.append(detail)
    shown = [i for i, heading in enumerate(head) if heading not in dropped]
    return [tuple(row[i] for i in shown) for row in body], dropped


def print_rows(body: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """Print a table within the width of the output; the first row is the headings.

    Columns that do not fit are dropped and named below the table; further cells are wrapped. A pipe
    without COLUMNS gets every column, one line per row.
    """
    width = columns_of_output()
    (head, *rest), dropped = fitted(body, width)
    if width is None or not _print_rich(head, rest, left, width):
        _print_plain(head, rest, left, width)
    if dropped:
        print()
        print_lines([f"left out at {width} columns: {', '.join(dropped)} (--csv has all)"])


def _print_plain(
    head: Sequence[str], rest: Sequence[Sequence[str]], left: Collection[int], width: int | None
) -> None:
    """Print the table without rich; names are on lines of their own if rows are too long."""
    sizes = [max(len(row[index]) for row in (head, *rest)) for index in range(len(head))]
    alone = width is not None and sum(sizes) + 2 * (len(sizes) - 1) > width
    for row in [head, tuple("-" * size for size in sizes), *rest]:
        cells = [
            cell.ljust(size) if index in left else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ]
        print("  ".join([cells[0].rstrip() + "\n", *cells[1:]] if alone else cells).rstrip())


def _print_rich(
    head: Sequence[str], rest: Sequence[Sequence[str]], left: Collection[int], width: int
) -> bool:
    """Print the table with rich; return False if rich is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(head):
        longest = max(len(row[index]) for row in (head, *rest))
        table.add_column(
            Text(heading),
            justify="left" if index in left else "right",
            overflow="fold",
            # Names are not wrapped, unless a name leaves no room for a figure.
            no_wrap=index == 0 and longest + 12 <= width,
        )
    for row in rest:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=width).print(table)
    return True


def print_lines(lines: Sequence[str]) -> None:
    """Print lines of text, wrapped at the width of the output; names and words are not cut."""
    width = columns_of_output()
    for line in lines:
        if width is not None:
            line = textwrap.fill(
                line,
                width,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(line)


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
