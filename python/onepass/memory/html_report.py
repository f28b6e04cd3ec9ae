"""Stacked bars of memory use as one HTML file, with hover labels."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .plots import COLOURS
from .report import CATEGORIES, TITLES, MemoryReport
from .sizes import show

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; } .note { opacity: .75; }
.row { display: grid; grid-template-columns: 15rem 1fr; align-items: center; margin: .25rem 0; }
.row > b { font-weight: 500; text-align: right; padding-right: .75rem; overflow-wrap: anywhere; }
.bar { position: relative; display: flex; }
.part { flex: none; height: 1.7rem; outline: 1px solid Canvas; }
.part:hover, .part:focus { outline: 2px solid CanvasText; }
.tip { display: none; position: absolute; top: 105%; left: 0; z-index: 3; max-width: 100%;
  background: CanvasText; color: Canvas; padding: .3rem .6rem; border-radius: .3rem; }
.part:hover .tip, .part:focus .tip { display: block; }
.peak { padding-left: .5rem; white-space: nowrap; align-self: center; }
.limit { position: absolute; top: -.25rem; height: 2.2rem; border-left: 2px dashed CanvasText; }
@media (max-width: 45rem) { .row { grid-template-columns: 1fr; } .row > b { text-align: left; }
  .bar { flex-wrap: wrap; } .peak { flex-basis: 100%; padding: 0; white-space: normal; } }
.legend span { display: inline-block; margin: 0 1.2rem .3rem 0; }
.legend i { display: inline-block; width: 1rem; height: 1rem; margin-right: .4rem;
  vertical-align: -.15rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin-top: 1.5rem; }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
"""


def page(
    reports: Sequence[MemoryReport],
    title: str,
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    limit: int | None = None,
) -> str:
    """A self-contained HTML page with a bar for each report.

    Args:
        reports: the reports; a report without bytes has no bar.
        title: the title of the page.
        rows: the rows of the table below the bars; the first row contains the headings.
        notes: sentences below the table.
        limit: a memory limit in bytes, drawn as a vertical line; None for no line.
    """
    shown = [(report, found) for report in reports if (found := report.bytes) is not None]
    # The bars use three quarters of the width, which leaves room for the label after each bar.
    whole = max([found.peak for _, found in shown] + [limit or 0, 1]) / 0.75
    used = [c for c in CATEGORIES if any(getattr(found, c) for _, found in shown)]
    legend = "".join(
        f'<span><i style="background:{COLOURS[c]}"></i>{TITLES[c]}</span>' for c in used
    )
    line = "" if limit is None else f'<div class="limit" style="left:{100 * limit / whole:.3f}%">'
    bars = []
    for report, found in shown:
        parts = []
        for category in used:
            value = getattr(found, category)
            if not value:
                continue
            each = value / report.parameters if report.parameters else 0.0
            said = f"{TITLES[category]}: {show(value)} ({value:,} bytes, {each:.2f} a parameter)"
            predicted, measured = report.predicted, report.measured
            if predicted is not None and measured is not None:
                said += f"; predicted {show(getattr(predicted, category))}"
            parts.append(
                f'<div class="part" tabindex="0" aria-label="{escape(said)}" style="width:'
                f'{100 * value / whole:.3f}%;background:{COLOURS[category]}">'
                f'<div class="tip">{escape(said)}</div></div>'
            )
        over = "; does not fit" if limit is not None and found.peak > limit else ""
        away = f" + {show(found.host)} on the host" if found.host else ""
        bars.append(
            f'<div class="row"><b>{escape(report.label)}</b><div class="bar">{"".join(parts)}'
            f'<span class="peak">{show(found.peak)}{away}{over}</span>'
            f"{line and line + '</div>'}</div></div>"
        )
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    table = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="legend">{legend}</p>\n{"".join(bars)}\n'
        f'<div class="table"><table><tr>{cells}</tr>{table}</table></div>\n{said}\n</body></html>\n'
    )
