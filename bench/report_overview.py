"""The table of docs/performance.md: milliseconds per billion parameters by device and format."""

from __future__ import annotations

from .report_cases import cases_of, formats, ours_of, per_billion
from .results import Line

LISTS = {"cpu": "50M", "cuda": "llama3-8B/16"}
"""Device type -> the list of tensors of the table, which is far larger than the caches."""
LIBRARIES = {
    "torch fused": ("torch-fused", "torch-fused-fp32"),
    "torch foreach": ("torch-foreach",),
    "DeepSpeed": ("deepspeed-cpu", "deepspeed-cuda"),
    "FlashOptim": ("flashoptim", "flashoptim-8bit"),
    "torchao": ("torchao", "torchao-8bit", "torchao-4bit"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes-8bit"),
}
"""Column of the table -> its providers; a case has at most one of them."""
NOTE = (
    "Milliseconds of one AdamW step per billion parameters, for lists of tensors much larger than "
    "the caches; in parentheses, the time divided by that of onepass. Multiply by the billions of "
    "parameters of your model that one device updates. torch has no 8-bit or 4-bit states and "
    "bitsandbytes no 4-bit states: beside such a setting of onepass stand torch with fp32 weights "
    "and states, and bitsandbytes with 8-bit states. FlashOptim in the row of split8 and mx8 uses "
    "its own 24-bit weights and 8-bit states. A dagger (†) marks a time of another run than that "
    "of onepass. An empty cell has not been measured, or the library does not support the setting."
)


def rows_of(lines: list[Line]) -> list[list[Line]]:
    """The cases of the table for the lines of one device: AdamW on the large list."""
    wanted = LISTS["cuda" if lines[0]["cuda"] else "cpu"]
    found = [x for x in lines if x["rule"] == "adamw" and x["list"] == wanted]
    return [case for case in cases_of(found) if ours_of(case)]


def table(lines: list[Line]) -> list[str]:
    """The table of one device, as Markdown; empty if no case of the table was measured.

    Args:
        lines: the newest lines of the device.
    """
    cases = rows_of(lines)
    used = [
        name
        for name, providers in LIBRARIES.items()
        if any(line["provider"] in providers for case in cases for line in case)
    ]
    if not cases:
        return []
    text = [
        f"| setting of onepass | onepass | {' | '.join(used)} |",
        "|---|" + "---:|" * (len(used) + 1),
    ]
    for case in cases:
        ours = ours_of(case)
        assert ours is not None
        cells = [formats(ours), f"**{_number(per_billion(ours))}**"]
        for name in used:
            other = next((x for x in case if x["provider"] in LIBRARIES[name]), None)
            cells.append("" if other is None else _cell(other, ours))
        text.append(f"| {' | '.join(cells)} |")
    return text


def _cell(other: Line, ours: Line) -> str:
    mark = "" if other["date"] == ours["date"] else "†"
    ratio = per_billion(other) / per_billion(ours)
    return f"{_number(per_billion(other))}{mark} ({_number(ratio)}x)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
