"""``python -m bench.report``: docs/performance.md and docs/performance.png from the result lines.

Of every case and provider on a device the newest line counts. No figure is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onepass.benchmark.cases import BEYOND_CACHE
from onepass.benchmark.measure import LIMITS

from . import bars, phase, results
from .cases import cpu_cases, gpu_cases
from .results import Line, case_key

OURS = "onepass-"
# Okabe and Ito's colours, told apart by colour-blind readers too; the shapes tell them apart in
# black and white.
STYLES: dict[str, tuple[str, str]] = {
    "onepass-cpu": ("#0072B2", "o"),
    "torch-fused": ("#E69F00", "s"),
    "torch-foreach": ("#CC79A7", "D"),
    "deepspeed-cpu": ("#009E73", "^"),
    "in-place": ("#000000", "|"),
}
RULE_NAMES = {
    "adamw": "AdamW",
    "lion": "Lion",
    "sgd": "SGD with momentum",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
}


def newest(lines: list[Line]) -> list[Line]:
    """The newest line of each device, case and provider, in the order of first appearance."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = (line["device"], *case_key(line), line["provider"])
        if key not in found or line["date"] >= found[key]["date"]:
            found[key] = line
    return list(found.values())


def _cases(lines: list[Line]) -> list[list[Line]]:
    """The lines of each case, those of a known case in the order of cases.py."""
    groups: dict[tuple[str, str, str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(case_key(line), []).append(line)
    order = {case.key: i for i, case in enumerate([*cpu_cases(), *gpu_cases()])}
    return [groups[key] for key in sorted(groups, key=lambda key: order.get(key, len(order)))]


def title(line: Line) -> str:
    """A case in words."""
    rule = RULE_NAMES.get(line["rule"], line["rule"])
    if line["param_dtype"] == line["states"]:
        formats = line["states"] if line["states"] == "fp32" else f"all {line['states']}"
    else:
        kept = "" if line["weights"] == "native" else f" {line['weights']}"
        formats = f"{line['param_dtype']}{kept} weights, {line['states']} states"
    return f"{rule}, {formats}, {line['list']}"


def _steps(case: list[Line]) -> list[Line]:
    return sorted(
        (line for line in case if line["provider"] not in LIMITS), key=lambda x: x["ms"]["p50"]
    )


def slower_cases(cases: list[list[Line]]) -> list[str]:
    """A sentence for each case in which another provider's median is below ours."""
    found = []
    for case in cases:
        steps = _steps(case)
        ours = next((line for line in steps if line["provider"].startswith(OURS)), None)
        if ours is None or steps[0] is ours:
            continue
        first, mine = steps[0]["ms"]["p50"], ours["ms"]["p50"]
        found.append(
            f"- {title(ours)}: {steps[0]['provider']} {first:.3f} ms, {ours['provider']} "
            f"{mine:.3f} ms ({mine / first - 1:.1%} more)"
        )
    return found


def _table(case: list[Line]) -> list[str]:
    steps = _steps(case)
    limits = [line for line in case if line["provider"] in LIMITS]
    host = any(line["host_us"] is not None for line in case)
    head = ["provider", "version", "p20 ms", "p50 ms", "p80 ms", "GB/s", "of copy"]
    if host:
        head = [*head[:5], "host µs"]
    head.append("extra MB")
    rows = []
    for line in steps if host else [*steps, *limits]:
        ms = [f"{line['ms'][key]:.3f}" for key in ("p20", "p50", "p80")]
        row = [line["provider"], line["provider_version"], *ms]
        if host:
            row.append("" if line["host_us"] is None else f"{line['host_us']:,.0f}")
        else:
            row += [f"{line['gbps']:.2f}", f"{line['share']:.2f}"]
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
    rows = ["| bar (AdamW) | ratio | needed | result |", "|---|---:|---:|---|"]
    for verdict in bars.judge(lines):
        ratio = "" if verdict.ratio is None else f"{verdict.ratio:.2f}"
        rows.append(f"| {verdict.bar.text} | {ratio} | {verdict.bar.needed:g} | {verdict.result} |")
    return rows


def markdown(
    lines: list[Line], sources: Sequence[str], picture: str | None, phases: Sequence[Line] = ()
) -> str:
    """The page. lines: those of :func:`newest`; sources: the files that they are from; phases: the
    lines of bench.phase."""
    text = [
        "# Performance",
        "",
        f"Generated by `python -m bench.report` from {', '.join(sources)}: do not edit.",
        "Measured by `python -m bench` (bench/README.md says how).",
        "",
        "- **p20, p50, p80**: percentiles of the wall-clock time of one `step()`, gradients in "
        "place.",
        "- **GB/s**: bytes of the written formula / p50, 1 GB = 10^9 bytes. Per element: weight "
        "read and written, gradient read, each state read and written.",
        "- **of copy**: GB/s over those of `copy_` of as many bytes in the same turns. A copy also "
        "reads the lines that it is about to write, which no formula counts; a step and `in-place` "
        "(`mul_` by one) do not, so they can be above 1.",
        "- **host µs**: p50 over tensors of one element, where a step is host time.",
        "- **extra MB**: what a step needs at most beyond what was there before it (resident set; "
        "below 0.5 MB it is noise).",
        "- Lists are named by tensors x elements; `+1`: one element off the start of the storage.",
        "",
        "Not measured: any GPU, `weights` other than native, stochastic and split8, "
        "gradients of another dtype than the weights.",
    ]
    for device in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == device]
        cases = _cases(own)
        text += ["", f"## {device}", "", f"Runs: {_runs(own)}.", ""]
        if len({line["date"] for line in own}) == 1:
            text += [*_bar_table(own), ""]
        else:
            text += ["The lines are of several runs, so no bar is judged.", ""]
        slower = slower_cases(cases)
        text += ["### Where onepass is not the fastest", ""]
        text += slower or ["Nowhere among these cases."]
        if picture is not None:
            text += ["", f"![Share of the copy bandwidth per case]({picture})"]
        for case in cases:
            size = next((x["bytes"] for x in case if x["provider"] not in LIMITS), case[0]["bytes"])
            text += ["", f"### {title(case[0])}", "", f"{size / 1e6:,.3f} MB a step.", ""]
            text += _table(case)
        picture = None  # one picture, beside the device that it shows
    if phases:
        text += ["", "## The optimizer phase: unscale, clip, step, zero", ""]
        text += ["AdamW, fp32, by `python -m bench.phase`, which says what is timed.", ""]
        text += phase.table(phases)
    return "\n".join(text) + "\n"


def draw(lines: list[Line], path: Path) -> bool:
    """The share of the copy bandwidth per case of the first device; False if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    device = lines[0]["device"]
    own = [line for line in lines if line["device"] == device]
    # Where everything stays in a cache, or nothing but the host works, bandwidth says little.
    cases = [case for case in _cases(own) if any(x["bytes"] >= BEYOND_CACHE for x in _steps(case))]
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
    axes.set_xlabel("bytes of the formula per second, as a share of copy_ (higher is better)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One optimizer step\n{device}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    """Writes the page and the picture; 0 done, 2 nothing to read."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Writes docs/performance.md from bench/results."
    )
    root = results.ROOT
    parser.add_argument("--results", type=Path, default=root / "bench" / "results", metavar="DIR")
    parser.add_argument("--docs", type=Path, default=root / "docs", metavar="DIR")
    args = parser.parse_args(argv)
    files = sorted(args.results.glob("*.jsonl"))
    files = [file for file in files if results.read(file)]  # others are of other benchmarks
    lines = newest([line for file in files for line in results.read(file)])
    if not lines:
        print(f"bench.report: no result lines in {args.results}; run python -m bench first")
        return 2
    args.docs.mkdir(parents=True, exist_ok=True)
    picture = args.docs / "performance.png"
    drawn = draw(lines, picture)
    page = args.docs / "performance.md"
    sources = [
        str(file.relative_to(root) if file.is_relative_to(root) else file.name) for file in files
    ]
    phases = results.read_lines(args.results / "phase.jsonl")
    text = markdown(lines, sources, picture.name if drawn else None, phases)
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}" + (f" and {picture}" if drawn else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
