"""The tables of docs/cuda.md, from the lines of :mod:`bench.tuning`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from onepass_tools.benchmark.timing import percentile

from . import results
from .results import Line
from .tuning_variants import FORMATS, VARIANTS, today

START = "<!-- Written by python -m bench.tuning --report: do not edit. -->"
END = "<!-- The end of what bench.tuning writes. -->"


def medians(lines: Iterable[Line], name: str, variants: Sequence[str]) -> dict[str, float]:
    """Variant -> median milliseconds of a step in a format, over the samples of all rounds."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["format"] == name and line["variant"] in variants:
            found.setdefault(line["variant"], []).extend(line["samples"])
    return {key: percentile(samples, 50) for key, samples in found.items()}


def text(lines: Sequence[Line]) -> list[str]:
    """The tables as Markdown, from the lines with the newest sources, device and size."""
    measured = [x for x in lines if x.get("kind") == "tuning"]
    if not measured:
        return ["Not measured yet: there are no result lines of `python -m bench.tuning`."]
    last = measured[-1]
    keys = ("device", "built_of", "numel")
    lines = [x for x in lines if all(x.get(key) == last[key] for key in keys)]
    measured = [x for x in lines if x["kind"] == "tuning"]
    names = [v.name for v in VARIANTS]
    times = {name: medians(measured, name, names) for name in FORMATS}
    times = {name: found for name, found in times.items() if found}
    size = {x["format"]: x["bytes"] for x in measured}
    copies = [x["copy_gbps"] for x in measured]
    copy = percentile(copies, 50)
    dates = sorted({results.origin(x) for x in measured})
    rounds = len({x["round"] for x in measured})
    found = [
        f"{last['device']}; {'; '.join(dates)}; sources {last['built_of']}.",
        "",
        f"AdamW on one tensor of {last['numel']:,} elements, "
        f"{len(last['samples'])} samples in each of {rounds} rounds. Copies, interleaved with the "
        f"steps, reached {min(copies):,.0f} to {max(copies):,.0f} GB/s, median {copy:,.0f}. Each "
        "cell is the bandwidth of a step's bytes divided by this median; the fastest variant of a "
        "column is bold. The name of a variant is threads x thread blocks per multiprocessor, then "
        "the elements of a chunk; a list with fp32 states has half as many elements per chunk. The "
        "chunks at the end of a list are shorter, except in variants named no-taper.",
        "",
        f"| variant | {' | '.join(times)} |",
        "|---|" + "---:|" * len(times),
    ]
    for variant in names:
        if not any(variant in of for of in times.values()):
            continue
        cells = []
        for name, of in times.items():
            share = f"{size[name] / of[variant] / 1e6 / copy:.3f}" if variant in of else ""
            cells.append(f"**{share}**" if variant == min(of, key=lambda key: of[key]) else share)
        found.append(f"| {variant} | {' | '.join(cells)} |")
    found += ["", *_winners(lines, times)]
    return found


def _winners(lines: Sequence[Line], times: dict[str, dict[str, float]]) -> list[str]:
    """The table of the fastest variant of each format, compared with the values of tuning.h."""
    found = [
        "| weights+states | fastest | ms | in `tuning.h` | ms | time saved | bits |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    for name, of in times.items():
        best = min(of, key=lambda key: of[key])
        verdict = "not compared"
        for line in lines:
            if line["kind"] == "tuning-winner" and (line["format"], line["variant"]) == (
                name,
                best,
            ):
                verdict = line["verdict"]
        now = today(name).name
        ms = of.get(now)
        then = f"{now} | {ms:.3f} | {1 - of[best] / ms:.1%}" if ms else f"{now} | | "
        found.append(f"| {name} | {best} | {of[best]:.3f} | {then} | {verdict} |")
    return found


def write(path: Path, docs: Path) -> int:
    """Replaces the text between the two markers of a page.

    Args:
        path: file of the result lines.
        docs: the page.

    Returns:
        0 on success; 2 if the page does not have each marker once, in order.
    """
    page = docs.read_text(encoding="utf-8")
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        print(f"bench.tuning: {docs} must contain each of these lines once: {START} {END}")
        return 2
    before, after = page.split(START)[0], page.split(END)[1]
    body = "\n".join([START, "", *text(results.read_lines(path)), "", END])
    docs.write_text(before + body + after, encoding="utf-8")
    print(f"wrote {docs}")
    return 0
