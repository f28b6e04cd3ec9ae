"""``python -m bench.readme``: tables of README.md and of four pages from the result lines.

A test fails if a page differs from what this module writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onepass_tools.benchmark.cases import DTYPES
from onepass_tools.benchmark.providers import all_providers

from . import (
    momentum_formats,
    momentum_loss,
    results,
    sgd8bit,
    training_report,
    weight_sync,
)
from .cases import gpu_cases
from .results import Line, case_key

PAGES = tuple(
    results.ROOT / name
    for name in (
        "README.md",
        "docs/settings.md",
        "docs/migrate.md",
        "docs/weight-sync.md",
        "docs/algorithms/muon.md",
    )
)
COMMITTED = results.ROOT / "bench" / "results"
OURS = "onepass-cuda"
LIST = "llama3-8B/16"
FP32 = ("adamw", "fp32", "native", "fp32", LIST)
EIGHT_BITS = ("adamw", "bf16", "split8", "mx8", LIST)
FOUR_BITS = ("adamw", "bf16", "stochastic", "mx4", LIST)
NAMES = {
    OURS: "**onepass** `AdamW`",
    "torch-fused-fp32": "torch `AdamW(fused=True)`",
    "flashoptim-8bit": "FlashOptim `FlashAdamW`",
    "torchao-8bit": "torchao `AdamW8bit`",
    "bitsandbytes-8bit": "bitsandbytes `AdamW8bit`",
}
"""The providers of the table of speed, and what README calls them."""


@dataclass(frozen=True)
class Setting:
    """A row of the table of settings: arguments, benchmark case, and name of the training runs."""

    purpose: str
    arguments: str
    case: tuple[str, str, str, str, str]
    training: str


SETTINGS = (
    Setting("fp32 training, as with torch.optim", "`AdamW(params)`", FP32, "fp32"),
    Setting(
        "bf16 training: **the recommended setting**",
        '`AdamW(params, states="mx8", weights="split8")`',
        EIGHT_BITS,
        "bf16 + split8 + mx8",
    ),
    Setting(
        "bf16 training in the least memory",
        '`AdamW(params, states="mx4", weights="stochastic")`',
        FOUR_BITS,
        "bf16 + stochastic + mx4",
    ),
)


def newest_run(folder: Path, key: tuple[str, str, str, str, str]) -> dict[str, Line]:
    """The lines of one run of a case on a GPU, by provider.

    The run is the newest of those with the most providers of the speed table.

    Raises:
        ValueError: no line of this case was measured on a GPU.
    """
    runs: dict[str, dict[str, Line]] = {}
    for line in results.read(folder / "gpu.jsonl"):
        if case_key(line) == key and line["driver"]:
            runs.setdefault(line["date"], {})[line["provider"]] = line
    runs = {date: run for date, run in runs.items() if OURS in run}
    if not runs:
        raise ValueError(f"bench/results/gpu.jsonl has no run of {'/'.join(key)} with {OURS}")
    return runs[max(runs, key=lambda date: (len(runs[date].keys() & NAMES.keys()), date))]


def held_bytes(line: Line, gradient: int) -> float:
    """Bytes per parameter of the weight, its companion, the gradient and the states.

    A step reads and writes all of them, except that it only reads the gradient.
    """
    moved: float = line["bytes"] / line["numel"]
    return (moved + gradient) / 2


def _speed_row(line: Line, ours: Line) -> str:
    case = next(case for case in gpu_cases() if case.key == case_key(line))
    provider = next(p for p in all_providers("cuda") if p.name == line["provider"])
    dtype = provider.dtype_in(case)
    bits = 8 * DTYPES[dtype].itemsize
    if case.weights == "split8" and (provider.ours or case.weights in provider.kept):
        bits += 8
    states = 32 if dtype == "fp32" or case.states == "fp32" else 8
    ms = line["ms"]["p50"]
    ratio = "" if line["provider"] == OURS else f"{ms / ours['ms']['p50']:.1f}"
    held = held_bytes(line, DTYPES[dtype].itemsize)
    name = NAMES[line["provider"]]
    if provider.ours:
        name += " with 8-bit moments" if states == 8 else ""
    return f"| {name} | {ms:.2f} | {ratio} | {held:.1f} | {bits} | {states} |"


def speed_table(folder: Path = COMMITTED) -> str:
    """The time of an AdamW step with each library, and its bytes per parameter."""
    run, full = newest_run(folder, EIGHT_BITS), newest_run(folder, FP32)
    ours, exact = run[OURS], full[OURS]
    others = sorted(
        (run[name] for name in NAMES if name in run and name != OURS), key=lambda x: x["ms"]["p50"]
    )
    rows = [
        "| AdamW step | ms | times onepass's 8-bit step | bytes per parameter | bits of a weight | "
        "bits of a moment |",
        "|---|---:|---:|---:|---:|---:|",
        _speed_row(ours, ours),
        _speed_row(exact, ours),
        *(_speed_row(line, ours) for line in others),
    ]
    text = (
        f"{ours['device']}, {ours['numel'] / 1e6:,.0f} M parameters in {ours['tensors']} tensors "
        f"(a sixteenth of Llama 3 8B), median of {len(ours['samples'])} steps. "
        f"Versions: {_versions(others)}. "
        f"Run of {_origin(ours)}"
    )
    if exact["date"] != ours["date"]:
        text += f"; the row with 32-bit moments of onepass: {_origin(exact)}"
    note = (
        ". *Bytes per parameter*: weight, gradient and everything that the optimizer keeps. "
        "The rows differ in precision: torchao and bitsandbytes keep the bf16 weight only."
    )
    return "\n".join([*rows, "", text + note])


def _versions(lines: Sequence[Line]) -> str:
    found = {line["provider"].split("-")[0]: line["provider_version"] for line in lines}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _origin(line: Line) -> str:
    return f"{line['date'][:10]}, commit {str(line['commit'])[:7]}"


def share_text(folder: Path = COMMITTED) -> str:
    """The optimizer's share of a training step on a GPU, in the newest run."""
    lines = [x for x in results.read_lines(folder / "share.jsonl") if x["driver"]]
    last = max(line["date"] for line in lines)
    run = {line["provider"]: line for line in lines if line["date"] == last}
    ours, fused, foreach = (run[name] for name in ("onepass", "torch-fused", "torch-foreach"))
    return (
        f"**Share of a training step.** On the same GPU, AdamW with fp32 states takes "
        f"{ours['share']:.1%} of a training step of a GPT with {ours['parameters'] / 1e6:.0f} M "
        f"parameters with onepass, {fused['share']:.1%} with torch's fused and "
        f"{foreach['share']:.1%} with torch's foreach implementation (batches of {ours['batch']} "
        f"x {ours['context']} tokens; {_origin(ours)}). The larger the batch, the smaller the "
        "share, and the less a faster step matters."
    )


def settings_table(folder: Path = COMMITTED) -> str:
    """The three settings: memory, time, and loss beside fp32."""
    lines = [x for x in results.read_lines(folder / "training.jsonl") if x["kind"] == "training"]
    section = training_report.sections(training_report.newest(lines))[0]
    runs = training_report.by_config(section)
    verdicts = {v.settings["name"]: v for v in training_report.judge(runs)}
    rows = [
        "| purpose | bytes per parameter | ms on the H200 | loss minus fp32's | arguments |",
        "|---|---:|---:|---:|---|",
    ]
    for setting in SETTINGS:
        line = newest_run(folder, setting.case)[OURS]
        held = held_bytes(line, DTYPES[line["grad_dtype"]].itemsize)
        loss = "baseline"
        if setting.training in verdicts:
            verdict = verdicts[setting.training]
            loss = f"{verdict.difference:+.4f} ± {verdict.interval:.4f}"
        cells = [setting.purpose, f"{held:.1f}", f"{line['ms']['p50']:.2f}", loss]
        rows.append(f"| {' | '.join([*cells, setting.arguments])} |")
    one, base = section[0], runs["fp32"]
    spread = verdicts[SETTINGS[1].training].spread
    scope = (
        ""
        if (folder / "pretrain.jsonl").exists()
        else (" Larger models, long runs and training on a GPU have not been measured.")
    )
    text = (
        f"The loss is the mean over {len(base)} seeds of the final validation loss, with a 95 % "
        f"interval; the standard deviation over the seeds of fp32 is {spread:.4f}. Scope: one "
        f"byte-level GPT of {one['parameters']:,} parameters, {one['settings']['steps']} steps on "
        f"a CPU.{scope}"
    )
    return "\n".join([*rows, "", text])


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed_table,
    "share": share_text,
    "settings": settings_table,
    "weight_sync": lambda: weight_sync.table(results.read_lines(COMMITTED / "weight_sync.jsonl")),
    "sgd8bit": lambda: sgd8bit.table(results.read_lines(COMMITTED / "sgd8bit.jsonl")),
    "momentum": lambda: momentum_formats.table(results.read_lines(COMMITTED / "momentum.jsonl")),
    "momentum loss": lambda: momentum_loss.table(
        results.read_lines(COMMITTED / "momentum_loss.jsonl")
    ),
}


def page(text: str) -> str:
    """The page with each of its tables replaced by the current one."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if begin in text and end in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}{table()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Writes the pages; with --check, returns 1 if a page is stale."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    args = parser.parse_args(argv)
    stale = 0
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = page(old)
        if new == old:
            continue
        if args.check:
            print(f"{path.name} is stale: run python -m bench.readme", file=sys.stderr)
            stale = 1
        else:
            path.write_text(new, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
