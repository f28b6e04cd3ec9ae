"""``python -m bench.report``: writes the pages on performance and their pictures.

docs/performance.md has the overview, docs/performance/ a page for each device.

The newest line of each case and provider on a device counts. No figure is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass_tools.benchmark.cases import BEYOND_CACHE
from onepass_tools.benchmark.providers import all_providers
from onepass_tools.benchmark.timing import LIMITS

from . import bars, phase, report_overview, report_plots, results, share, sizes
from .ladder import rungs
from .report_cases import (
    OURS,
    anchor,
    archived,
    by_device,
    cases_of,
    newest,
    slug,
    steps,
    title,
)
from .results import Line

# State format -> why onepass is slower than another provider.
CPU_REASONS = {
    "mx8": "With AVX2 this format is limited by arithmetic: an element takes about as long with "
    "data in a cache as with data in memory. It is faster than fp32 on machines with slower "
    "memory, or with AVX-512.",
    "mx4": "This format is limited by arithmetic: an element takes as long with data in a cache as "
    "with data in memory. It saves memory, not time: it has less than a third of the bytes of "
    "fp32.",
    "dynamic8": "The codes of bitsandbytes are a table without a formula: decoding a code takes "
    "one gather; encoding took three when this was measured, and takes one since. The format "
    "exists to exchange checkpoints with bitsandbytes; mx8 is the fast 8-bit format.",
}
GPU_REASONS = {
    "dynamic8": "When this was measured, the format had no specialised kernel and searched a table "
    "for each code. The kernel that it has since (docs/cuda.md) has not been measured.",
}
OUTDATED = {
    ("0c4df720749c", "adamw", "bf16", "native", "fp32"): "This version (commit 0c4df72) has no "
    "specialised kernel for bf16 weights with fp32 states and runs its generic tiles. Later "
    "versions have one (docs/cpu.md), which has not been measured on this processor."
}
"""(commit, rule, dtype, format of the weights, format of the states) -> a reason that holds for
this commit only."""
OVERLAP = "The samples overlap, so they do not show which of these providers is faster."
UNEXPLAINED = "The cause is unknown."


def slower_cases(cases: list[list[Line]]) -> list[str]:
    """A list item for each case in which other providers have a smaller median time than onepass.

    It names each of these providers, and the reason.
    """
    found = []
    for case in cases:
        timed = steps(case)
        ours = next((line for line in timed if line["provider"].startswith(OURS)), None)
        if ours is None or timed[0] is ours:
            continue
        mine = ours["ms"]
        faster, overlap = [], True
        for line in timed[: timed.index(ours)]:
            ms = line["ms"]
            within = ms["p80"] >= mine["p20"]
            overlap = overlap and within
            spread = ", within the spread of the samples" if within else ""
            more = f"{mine['p50'] / ms['p50'] - 1:.1%} more{spread}"
            faster.append(f"{line['provider']} {ms['p50']:.3f} ms ({more})")
        found.append(
            f"- {title(ours)}: {ours['provider']} {mine['p50']:.3f} ms, {', '.join(faster)}. "
            f"{reason(ours, overlap)}"
        )
    return found


def reason(line: Line, overlap: bool = False) -> str:
    """Why a step of onepass takes longer than that of another provider.

    Args:
        line: the line of onepass.
        overlap: whether its samples overlap with those of every faster provider.
    """
    case = (line["rule"], line["param_dtype"], line["weights"], line["states"])
    if found := OUTDATED.get((str(line["commit"])[:12], *case)):
        return found
    reasons = GPU_REASONS if line["cuda"] else CPU_REASONS
    return reasons.get(line["states"], OVERLAP if overlap else UNEXPLAINED)


def unmeasured(lines: list[Line]) -> str:
    """What has no result line, in words."""
    found = [] if any(line["cuda"] for line in lines) else ["any GPU"]
    seen = {line["provider"] for line in lines}
    known = {p.name for device in ("cpu", "cuda") for p in all_providers(device)}
    for what, names, values in (
        ("states", STATE_FORMATS, {line["states"] for line in lines}),
        ("weights", WEIGHT_FORMATS, {line["weights"] for line in lines}),
        ("providers", sorted(known), seen),
    ):
        if missing := [name for name in names if name not in values]:
            found.append(f"{what} {', '.join(missing)}")
    return "; ".join([*found, "gradients with another dtype than the weights"])


def _table(case: list[Line]) -> list[str]:
    timed = steps(case)
    limits = [line for line in case if line["provider"] in LIMITS]
    host = any(line["host_us"] is not None for line in case)
    # On a CPU, a line has a host time only if the whole step is host time.
    speed = not host or case[0]["cuda"] is not None
    head = ["provider", "version", "p20 ms", "p50 ms", "p80 ms"]
    head += ["GB/s", "of copy"] * speed + ["host µs"] * host + ["extra MB"]
    rows = []
    for line in [*timed, *limits] if speed else timed:
        ms = [f"{line['ms'][key]:.3f}" for key in ("p20", "p50", "p80")]
        row = [line["provider"], line["provider_version"], *ms]
        if speed:
            share = f"{line['share']:.3f}" if line["bytes"] >= BEYOND_CACHE else ""
            row += [f"{line['gbps']:.2f}", share]
        if host:
            row.append("" if line["host_us"] is None else f"{line['host_us']:,.0f}")
        row.append("" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e6:,.1f}")
        rows.append(row)
    return [
        f"| {' | '.join(head)} |",
        "|---|---|" + "---:|" * (len(head) - 2),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _runs(lines: list[Line]) -> str:
    runs = sorted({(x["date"], str(x["commit"])[:12], x["dirty"], x["torch"]) for x in lines})
    return "; ".join(
        f"{date}, commit {commit}{' with uncommitted changes' if dirty else ''}, torch {torch}"
        for date, commit, dirty, torch in runs
    )


def _bar_table(lines: list[Line]) -> list[str]:
    """The table of targets; each ratio is from the newest run that measured both of its sides."""
    device = "cuda" if lines[0]["cuda"] else "cpu"
    dates = sorted({line["date"] for line in lines}, reverse=True)
    runs = [bars.judge([x for x in lines if x["date"] == date], device) for date in dates]
    rows = ["| target (AdamW) | ratio | needed | result |", "|---|---:|---:|---|"]
    for of_each_run in zip(*runs, strict=True):
        verdict = next((v for v in of_each_run if v.ratio is not None), of_each_run[0])
        bar = verdict.bar
        rows.append(f"| {bar.text} | {verdict.shown} | {bar.needed:g} | {verdict.result} |")
    return rows


INTRODUCTION = """
- **p20, p50, p80**: percentiles of the time of one `step()` with unchanged gradients: wall-clock \
time on a CPU, the time between two events on a GPU.
- **GB/s**: the bytes of a step divided by p50; 1 GB = 10^9 bytes. The bytes are those of a \
formula: the weight is read and written, the gradient is read, and each state is read and written.
- **of copy**: this bandwidth divided by that of `copy_` of as many bytes, interleaved with the \
steps. On a CPU, a copy also reads the cache lines that it is about to write, which the formula \
does not count. A step and `in-place` (`mul_` by one) do not, so their values can be above 1. The \
column is empty if the bytes of a step may stay in a cache.
- **host µs**: the time for which a step occupies the host. On a CPU it is given for tensors of \
one element only, where it is the p50 of the whole step.
- **extra MB**: the largest additional memory during a step: resident set on a CPU (values below \
0.5 MB are noise), memory of torch's allocator on a GPU.
- **ratio** of a target: the time of the other provider divided by that of onepass; for a copy, \
the bandwidth of onepass divided by that of the copy.
- Lists are named by tensors x elements per tensor; `+1`: each tensor starts one element after the \
start of its storage.
"""


def overview(lines: list[Line], sources: Sequence[str], more: Sequence[str] = ()) -> str:
    """docs/performance.md.

    Args:
        lines: the result of :func:`newest`.
        sources: names of the files that the lines are from.
        more: lines of text of the sections of other benchmarks.
    """
    old = archived(lines)
    devices = by_device(lines)
    text = [
        "# Performance",
        "",
        f"Generated by `python -m bench.report` from {', '.join(sources)}: do not edit.",
        "Measured by `python -m bench`; bench/README.md describes the method.",
        "",
        "## Time of a step on your device",
        "",
        report_overview.NOTE,
    ]
    for device, own in devices.items():
        if device not in old and (table := report_overview.table(own)):
            last = max(line["date"] for line in own)
            text += ["", f"**[{device}](performance/{slug(device)}.md)**, {last[:10]}", "", *table]
    text += [
        "",
        "## Contents",
        "",
        "- [Time of a step on your device](#time-of-a-step-on-your-device)",
        *(f"- [{x[3:]}](#{anchor(x[3:])})" for x in more if x.startswith("## ")),
        "- [Kernel studies](performance/kernels.md): time against size, and what each optimization "
        "of the kernels gains",
    ]
    text += [f"- [{_entry(device, own)}" for device, own in devices.items() if device not in old]
    text += [
        f"- Archive: [{_entry(device, devices[device])}" for device in devices if device in old
    ]
    text += ["", f"Not measured: {unmeasured(lines)}."]
    return "\n".join([*text, *more]) + "\n"


def _entry(device: str, own: list[Line]) -> str:
    first, last = (pick(line["date"] for line in own)[:10] for pick in (min, max))
    dates = last if first == last else f"{first} to {last}"
    return f"{device}](performance/{slug(device)}.md): {len(cases_of(own))} cases, {dates}"


def device_page(own: list[Line], picture: str | None = None, old: bool = False) -> str:
    """The page of a device.

    Args:
        own: the newest lines of the device.
        picture: file name of its picture.
        old: whether a page of a newer device replaces it.
    """
    device = own[0]["device"]
    cases = cases_of(own)
    text = [f"# {device}", "", "Generated by `python -m bench.report`: do not edit."]
    if old:
        text += [
            "",
            "Archived: a processor with the same instruction set has been measured later.",
        ]
    text += ["", f"Runs: {_runs(own)}.", ""]
    text += ["## Contents", "", "- [Targets](#targets)"]
    text += ["- [Time with each library](#time-with-each-library)"] * bool(picture)
    text += ["- [Where onepass is not the fastest](#where-onepass-is-not-the-fastest)"]
    text += [f"- [{title(case[0])}](#{anchor(title(case[0]))})" for case in cases]
    text += ["- [Columns of the tables](#columns-of-the-tables)"]
    text += ["", "## Targets", "", *_bar_table(own), ""]
    text += ["## Where onepass is not the fastest", ""]
    text += slower_cases(cases) or ["onepass is the fastest provider in all of these cases."]
    if picture:
        text += ["", "## Time with each library", ""]
        text += [f"![Time of a step with each library, by case]({picture})"]
    for case in cases:
        size = next((x["bytes"] for x in case if x["provider"] not in LIMITS), case[0]["bytes"])
        text += [
            "",
            f"## {title(case[0])}",
            "",
            f"{size / 1e6:,.3f} MB per step.",
            "",
            *_table(case),
        ]
    text += ["", "## Columns of the tables", INTRODUCTION.rstrip("\n")]
    return "\n".join(text) + "\n"


def kernel_page(folder: Path, pictures: Path) -> str:
    """docs/performance/kernels.md; also draws its picture.

    Args:
        folder: folder of the result lines.
        pictures: folder that the picture is written to.
    """
    text = ["# Kernel studies", "", "Generated by `python -m bench.report`: do not edit."]
    if lines := results.read_lines(folder / "sizes.jsonl"):
        sizes.draw(lines, pictures / "sizes.png")
        text += ["", "## Time against size", ""]
        text += [
            "AdamW in fp32 on one tensor, measured by `python -m bench.sizes`. The fit is a "
            "constant plus a slope: one slope for sizes that stay in the caches and one for "
            "larger sizes. It minimises the squared relative error, which also determines the "
            "size at which the slope changes. The column *time / fit* is the measured time divided "
            "by that of the fit. The time of a copy is left out for sizes that are too small to "
            "time it.",
            "",
        ]
        text += ["![Time against size](sizes.png)", "", *sizes.table(lines)]
    if lines := results.read_lines(folder / "ladder.jsonl"):
        text += ["", "## The kernel ladder", ""]
        text += [
            "Measured by `python -m bench.ladder`. Each rung is a version of the step that differs "
            "from the rung above it in the optimization that it names.",
            "",
        ]
        text += rungs.table(lines)
    return "\n".join(text) + "\n"


def sections(folder: Path) -> list[str]:
    """The sections of docs/performance.md on a whole training step, as lines of text.

    Args:
        folder: folder of the result lines.
    """
    text: list[str] = []
    if lines := results.read_lines(folder / "share.jsonl"):
        text += ["", "## The optimizer's share of a training step", ""]
        text += [
            "The model of `onepass demo`, measured by `python -m bench.share`. A faster optimizer "
            "shortens a training step by at most this share.",
            "",
            *share.table(lines),
        ]
    if lines := results.read_lines(folder / "phase.jsonl"):
        text += ["", "## The optimizer phase: unscale, clip, step, zero", ""]
        text += [
            "AdamW in fp32, measured by `python -m bench.phase`: the time to unscale the "
            "gradients, clip them, take a step and set them to zero.",
            "",
        ]
        text += phase.table(lines)
    return text


def main(argv: list[str] | None = None) -> int:
    """Writes the page and the pictures; returns 0 on success, 2 if there are no result lines."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Writes docs/performance.md and docs/performance/ from bench/results.",
    )
    root = results.ROOT
    parser.add_argument(
        "--results",
        type=Path,
        default=root / "bench" / "results",
        metavar="DIR",
        help="folder of the result lines (default bench/results)",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=root / "docs",
        metavar="DIR",
        help="folder that the pages are written to (default docs)",
    )
    args = parser.parse_args(argv)
    files = sorted(args.results.glob("*.jsonl"))
    files = [file for file in files if results.read(file)]  # not those of other benchmarks
    lines = newest([line for file in files for line in results.read(file)])
    if not lines:
        print(f"bench.report: no result lines in {args.results}; run python -m bench first")
        return 2
    pages = args.docs / "performance"
    pages.mkdir(parents=True, exist_ok=True)
    old = archived(lines)
    for device, own in by_device(lines).items():
        picture = f"{slug(device)}.png"
        drawn = report_plots.draw(own, pages / picture)
        text = device_page(own, picture if drawn else None, device in old)
        (pages / f"{slug(device)}.md").write_text(text, encoding="utf-8")
    (pages / "kernels.md").write_text(kernel_page(args.results, pages), encoding="utf-8")
    sources = [
        str(file.relative_to(root) if file.is_relative_to(root) else file.name) for file in files
    ]
    page = args.docs / "performance.md"
    page.write_text(overview(lines, sources, sections(args.results)), encoding="utf-8")
    print(f"wrote {page} and {pages}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
