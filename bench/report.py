"""``python -m bench.report``: writes docs/performance.md and its pictures from the result lines.

The newest line of each case and provider on a device counts. No figure is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.optim.registry import classes
from onepass_tools.benchmark.cases import BEYOND_CACHE
from onepass_tools.benchmark.providers import all_providers
from onepass_tools.benchmark.timing import LIMITS

from . import bars, phase, results, share, sizes
from .cases import cpu_cases, gpu_cases
from .ladder import rungs
from .plot_styles import STYLES
from .results import Line, case_key

OURS = "onepass-"
RULE_NAMES = {name: found.__name__ for name, found in classes().items()}
RULE_NAMES["sgd"] = "SGD with momentum"
# State format -> why onepass is slower than another provider.
CPU_REASONS = {
    "mx8": "With AVX2 this format is limited by arithmetic: an element takes about as long with "
    "data in a cache as with data in memory. It is faster than fp32 on machines with slower "
    "memory, or with AVX-512.",
    "mx4": "This format is limited by arithmetic: an element takes as long with data in a cache as "
    "with data in memory. It saves memory, not time: it has less than a third of the bytes of "
    "fp32.",
    "dynamic8": "The codes of bitsandbytes are a table without a formula: decoding a code takes "
    "one gather, encoding takes three. The format exists to exchange checkpoints with "
    "bitsandbytes; mx8 is the fast 8-bit format.",
}
GPU_REASONS = {
    "dynamic8": "The format has no specialised kernel: it runs the kernel for mixed formats, which "
    "searches the table for each code. It exists to exchange checkpoints with bitsandbytes.",
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


def newest(lines: list[Line]) -> list[Line]:
    """The newest line of each device, case and provider.

    The device that was measured last comes first; its lines are in the order of first appearance.
    """
    found: dict[tuple[Any, ...], Line] = {}
    last: dict[str, str] = {}
    for line in lines:
        key = (line["device"], *case_key(line), line["provider"])
        if key not in found or line["date"] >= found[key]["date"]:
            found[key] = line
        last[line["device"]] = max(line["date"], last.get(line["device"], ""))
    return sorted(found.values(), key=lambda line: last[line["device"]], reverse=True)


def _cases(lines: list[Line]) -> list[list[Line]]:
    """The lines of each case; known cases are in the order of cases.py."""
    groups: dict[tuple[str, str, str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(case_key(line), []).append(line)
    order = {case.key: i for i, case in enumerate([*cpu_cases(), *gpu_cases()])}
    return [groups[key] for key in sorted(groups, key=lambda key: order.get(key, len(order)))]


def title(line: Line) -> str:
    """A case in words."""
    rule = RULE_NAMES.get(line["rule"], line["rule"])
    if line["param_dtype"] == line["states"] and line["weights"] == "native":
        formats = line["states"] if line["states"] == "fp32" else f"all {line['states']}"
    else:
        kept = "" if line["weights"] == "native" else f" {line['weights']}"
        formats = f"{line['param_dtype']}{kept} weights, {line['states']} states"
    return f"{rule}, {formats}, {line['list']}"


def _steps(case: list[Line]) -> list[Line]:
    """The lines of a case without the limits (copies), sorted by median time."""
    return sorted(
        (line for line in case if line["provider"] not in LIMITS), key=lambda x: x["ms"]["p50"]
    )


def slower_cases(cases: list[list[Line]]) -> list[str]:
    """A list item for each case in which other providers have a smaller median time than onepass.

    It names each of these providers, and the reason.
    """
    found = []
    for case in cases:
        steps = _steps(case)
        ours = next((line for line in steps if line["provider"].startswith(OURS)), None)
        if ours is None or steps[0] is ours:
            continue
        mine = ours["ms"]
        faster, overlap = [], True
        for line in steps[: steps.index(ours)]:
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
    formats = (line["rule"], line["param_dtype"], line["weights"], line["states"])
    if found := OUTDATED.get((str(line["commit"])[:12], *formats)):
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
    steps = _steps(case)
    limits = [line for line in case if line["provider"] in LIMITS]
    host = any(line["host_us"] is not None for line in case)
    # On a CPU, a line has a host time only if the whole step is host time.
    speed = not host or case[0]["cuda"] is not None
    head = ["provider", "version", "p20 ms", "p50 ms", "p80 ms"]
    head += ["GB/s", "of copy"] * speed + ["host µs"] * host + ["extra MB"]
    rows = []
    for line in [*steps, *limits] if speed else steps:
        ms = [f"{line['ms'][key]:.3f}" for key in ("p20", "p50", "p80")]
        row = [line["provider"], line["provider_version"], *ms]
        if speed:
            row += [f"{line['gbps']:.2f}", f"{line['share']:.3f}"]
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
does not count. A step and `in-place` (`mul_` by one) do not, so their values can be above 1.
- **host µs**: the time for which a step occupies the host. On a CPU it is given for tensors of \
one element only, where it is the p50 of the whole step.
- **extra MB**: the largest additional memory during a step: resident set on a CPU (values below \
0.5 MB are noise), memory of torch's allocator on a GPU.
- **ratio** of a target: the time of the other provider divided by that of onepass; for a copy, \
the bandwidth of onepass divided by that of the copy.
- Lists are named by tensors x elements per tensor; `+1`: each tensor starts one element after the \
start of its storage.
"""


def markdown(
    lines: list[Line],
    sources: Sequence[str],
    pictures: Mapping[str, str],
    more: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        lines: the result of :func:`newest`.
        sources: names of the files that the lines are from.
        pictures: device -> file name of its picture.
        more: lines of text of the sections of other benchmarks.
    """
    text = [
        "# Performance",
        "",
        f"Generated by `python -m bench.report` from {', '.join(sources)}: do not edit.",
        "Measured by `python -m bench`; bench/README.md describes the method.",
        INTRODUCTION,
        f"Not measured: {unmeasured(lines)}.",
    ]
    for device in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == device]
        cases = _cases(own)
        text += ["", f"## {device}", "", f"Runs: {_runs(own)}.", "", *_bar_table(own), ""]
        text += ["### Where onepass is not the fastest", ""]
        text += slower_cases(cases) or ["onepass is the fastest provider in all of these cases."]
        if device in pictures:
            text += ["", f"![Share of the copy bandwidth per case]({pictures[device]})"]
        for case in cases:
            size = next((x["bytes"] for x in case if x["provider"] not in LIMITS), case[0]["bytes"])
            text += ["", f"### {title(case[0])}", "", f"{size / 1e6:,.3f} MB per step.", ""]
            text += _table(case)
    return "\n".join([*text, *more]) + "\n"


def sections(folder: Path, docs: Path) -> list[str]:
    """The sections of the other benchmarks, as lines of text; also draws their pictures.

    Args:
        folder: folder of the result lines.
        docs: folder that the pictures are written to.
    """
    text: list[str] = []
    if lines := results.read_lines(folder / "sizes.jsonl"):
        sizes.draw(lines, docs / "performance-sizes.png")
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
        text += ["![Time against size](performance-sizes.png)", "", *sizes.table(lines)]
    if lines := results.read_lines(folder / "share.jsonl"):
        text += ["", "## The optimizer's share of a training step", ""]
        text += [
            "The model of `onepass demo`, measured by `python -m bench.share`.",
            "",
            *share.table(lines),
        ]
    if lines := results.read_lines(folder / "ladder.jsonl"):
        text += ["", "## The kernel ladder", ""]
        text += [
            "Measured by `python -m bench.ladder`. Each rung is a version of the step that differs "
            "from the rung above it in the optimization that it names.",
            "",
        ]
        text += rungs.table(lines)
    if lines := results.read_lines(folder / "phase.jsonl"):
        text += ["", "## The optimizer phase: unscale, clip, step, zero", ""]
        text += [
            "AdamW in fp32, measured by `python -m bench.phase`: the time to unscale the "
            "gradients, clip them, take a step and set them to zero.",
            "",
        ]
        text += phase.table(lines)
    return text


def draw(lines: list[Line], path: Path) -> bool:
    """Draws the share of the copy bandwidth of each case of a device; returns False for no case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Cases that stay in a cache, or consist of host time only, are left out: their bandwidth means
    # little.
    cases = [
        case for case in _cases(lines) if any(x["bytes"] >= BEYOND_CACHE for x in _steps(case))
    ]
    if not cases:
        return False
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.45 * len(cases)), layout="constrained")
    for provider, (colour, marker) in STYLES.items():
        points = [
            (line["share"], -row)
            for row, case in enumerate(cases)
            for line in case
            if line["provider"] == provider
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(
                x, y, s=75, color=colour, marker=marker, label=provider, alpha=0.85, zorder=3
            )
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle="--", label="copy")
    axes.set_yticks([-row for row in range(len(cases))], [title(case[0]) for case in cases])
    axes.set_xlim(left=0)
    axes.set_xlabel("bytes per second, as a share of copy_ (higher is better)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One optimizer step\n{lines[0]['device']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    """Writes the page and the pictures; returns 0 on success, 2 if there are no result lines."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Writes docs/performance.md from bench/results."
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
        help="folder that the page is written to (default docs)",
    )
    args = parser.parse_args(argv)
    files = sorted(args.results.glob("*.jsonl"))
    files = [file for file in files if results.read(file)]  # not those of other benchmarks
    lines = newest([line for file in files for line in results.read(file)])
    if not lines:
        print(f"bench.report: no result lines in {args.results}; run python -m bench first")
        return 2
    args.docs.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    for number, device in enumerate(dict.fromkeys(line["device"] for line in lines), 1):
        name = "performance.png" if number == 1 else f"performance-{number}.png"
        if draw([line for line in lines if line["device"] == device], args.docs / name):
            pictures[device] = name
    page = args.docs / "performance.md"
    sources = [
        str(file.relative_to(root) if file.is_relative_to(root) else file.name) for file in files
    ]
    more = sections(args.results, args.docs)
    page.write_text(markdown(lines, sources, pictures, more), encoding="utf-8")
    print(f"wrote {page}" + "".join(f", {name}" for name in pictures.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
