"""``python -m bench.coverage``: the tables of docs/gpu.md, from the stages and the committed lines.

The tables of what has run on which GPU are generated from result lines alone: a line of kind "part"
for each command of bench/gpu.sh that ended, and the lines that the benchmarks wrote themselves.
Some of the latter are older than the lines of kind "part".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules import RULES
from onepass_tools.benchmark.cases import DTYPES

from . import results
from .results import Line
from .session import COMMITTED, FILES, evidence
from .stages import STAGES, Part

PAGE = results.ROOT / "docs" / "gpu.md"
WRITES = {
    "bench": "gpu.jsonl",
    "phase": "phase.jsonl",
    "paging": "paging.jsonl",
    "weight-sync": "weight_sync.jsonl",
    "tuning": "tuning.jsonl",
    "pretrain": "pretrain.jsonl",
    "sizes": "sizes.jsonl",
    "share": "share.jsonl",
    "ladder": "ladder.jsonl",
}
"""Name of a part that writes result lines -> the file of these lines."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def on_gpus(lines: Sequence[Line]) -> list[Line]:
    """The lines that were measured on a GPU: only those have a driver version."""
    return [line for line in lines if line.get("driver")]


def stage_table() -> str:
    """The table of the stages and of what each part tests or measures."""
    rows = ["| stage | part | what it tests or measures | time limit (s) |", "|---|---|---|---:|"]
    for stage in STAGES:
        for part in stage.parts:
            name = f"{stage.number} {stage.name}"
            rows.append(f"| {name} | {part.name} | {part.shows} | {part.seconds} |")
    return "\n".join(rows)


def part_table(folder: Path = COMMITTED) -> str:
    """The table of what has run on which GPU."""
    parts = on_gpus(results.read_lines(folder / FILES["part"]))
    written = {name: on_gpus(results.read_lines(folder / file)) for name, file in WRITES.items()}
    every = [*parts, *(line for lines in written.values() for line in lines)]
    devices = sorted({line["device"] for line in every})
    if not devices:
        return "No result line of a GPU is committed."
    rows = [f"| part | {' | '.join(devices)} |", f"|---|{'---|' * len(devices)}"]
    for part in (part for stage in STAGES for part in stage.parts):
        cells = [_cell(part, device, parts, written.get(part.name, [])) for device in devices]
        rows.append(f"| {part.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(part: Part, device: str, parts: Sequence[Line], written: Sequence[Line]) -> str:
    """The last result of a part on a device, or the date of the newest line that it wrote."""
    own = [x for x in parts if x["device"] == device and x["part"] == part.name]
    if own:
        last = max(own, key=lambda line: line["date"])
        now = last["of"] == evidence(part, device)["of"]
        return f"{last['status']} {_when(last)}, {'these' if now else 'older'} sources"
    lines = [line for line in written if line["device"] == device]
    if lines:
        last = max(lines, key=lambda line: line["date"])
        hashes = last.get("sources") or {}  # the oldest lines have no hashes
        now = all(hashes.get(name) == of for name, of in evidence(part, device)["of"].items())
        return f"lines of {_when(last)}, {'these' if now else 'older'} sources"
    return "not yet"


def _when(line: Line) -> str:
    return f"{line['date'][:10]} ({str(line['commit'])[:7]})"


def format_table(folder: Path = COMMITTED) -> str:
    """The table of the share of the copy bandwidth by rule and format, from the newest lines."""
    lines = [x for x in on_gpus(results.read(folder / "gpu.jsonl")) if "onepass" in x["provider"]]
    devices = sorted({line["device"] for line in lines})
    if not devices:
        return "No result line of a GPU is committed."
    head = ["rule", "weights", *(f"states {name}" for name in STATE_FORMATS)]
    text = []
    for device in devices:
        own = [line for line in lines if line["device"] == device]
        rows = [f"| {' | '.join(head)} |", f"|---|---|{'---|' * len(STATE_FORMATS)}"]
        for rule, weights, dtype in _kinds():

            def of(line: Line, key: tuple[str, str, str] = (rule, weights, dtype)) -> bool:
                return (line["rule"], line["weights"], line["param_dtype"]) == key

            cells = [_share(own, of, states) for states in STATE_FORMATS]
            if rule == "adamw" or any(cell != "-" for cell in cells):
                rows.append(f"| {rule} | {dtype}, {weights} | {' | '.join(cells)} |")
        text += [f"{device}:", "", *rows, ""]
    return "\n".join(text[:-1])


def _kinds() -> list[tuple[str, str, str]]:
    """(rule, weight format, dtype): AdamW with each weight format, then the other rules."""
    found = [
        ("adamw", weights, NAMES[dtype])
        for weights, form in WEIGHT_FORMATS.items()
        for dtype in form.codes
        if dtype in NAMES
    ]
    return found + [(rule, "native", "fp32") for rule in RULES if rule != "adam"]


def _share(lines: Sequence[Line], of: Callable[[Line], bool], states: str) -> str:
    found = [line for line in lines if of(line) and line["states"] == states]
    if not found:
        return "-"
    last = max(found, key=lambda line: (line["numel"] >= 10**8, line["date"]))
    return f"{last['share']:.3f} ({last['date'][5:10]})"


TABLES = {"stages": stage_table, "parts": part_table, "formats": format_table}


def page(text: str) -> str:
    """The text of docs/gpu.md with its tables regenerated.

    Raises:
        ValueError: the begin or the end mark of a table is missing.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"docs/gpu.md must contain {begin.strip()} and {end}")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}{table()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Writes docs/gpu.md; returns 1 if --check finds that the page is out of date, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if the page is out of date"
    )
    args = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        print("docs/gpu.md is out of date: run python -m bench.coverage", file=sys.stderr)
    return int(args.check and new != old)


if __name__ == "__main__":
    sys.exit(main())
