"""``python -m bench``: measures optimizer steps on the CPU or the GPU of this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from onepass_tools.benchmark import table
from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.devices import DEVICES, Device
from onepass_tools.benchmark.provider import Provider
from onepass_tools.benchmark.providers import all_providers, find
from onepass_tools.benchmark.timing import run_case

from . import bars, results
from .cases import CASES, select
from .results import Line

FILES = {"cpu": "cpu.jsonl", "cuda": "gpu.jsonl"}
Missing = list[tuple[str, str]]
Measured = tuple[str | None, ...]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success; 1 if a step of onepass is wrong; 2 on wrong usage or if the device is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times optimizer steps of onepass and other libraries, interleaved.",
    )
    parser.add_argument(
        "--device", choices=list(DEVICES), default="cpu", help="device to measure (default cpu)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes; write no file unless --out is given"
    )
    parser.add_argument(
        "--cases",
        metavar="PATTERN",
        help="run the cases whose name contains or matches PATTERN, or one of several patterns, "
        "separated by commas",
    )
    parser.add_argument(
        "--providers",
        metavar="NAMES",
        help="run these providers, separated by commas; * and ? are wildcards",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="timed steps per provider")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append result lines to FILE (default cpu.jsonl or gpu.jsonl in bench/results)",
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="skip what has a result line for this device, version and kernel sources",
    )
    parser.add_argument(
        "--list", action="store_true", help="list cases and providers, measure nothing"
    )
    args = parser.parse_args(argv)
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples must be at least 1; got {args.samples}")
    cases = select(CASES[args.device](args.quick), args.cases)
    if not cases:
        parser.error(f"--cases: no case matches {args.cases!r}; --list prints the cases")
    try:
        chosen = find(all_providers(args.device), args.providers)
    except ValueError as error:
        parser.error(str(error))
    device = DEVICES[args.device]
    missing = [(p.name, why) for p in chosen if (why := p.unavailable(device.type))]
    available = [p for p in chosen if p.name not in dict(missing)]
    if args.list:
        _list(cases, available, missing)
        return 0
    if why := device.unavailable():
        print(f"bench: {why}", file=sys.stderr)
        return 2

    out: Path | None = args.out or results.ROOT / "bench" / "results" / FILES[device.type]
    if args.no_write or (args.quick and args.out is None):
        out = None
    known = _known(args.out, device) if args.missing else set()
    return _run(cases, available, missing, args.samples, out, device, known)


def _measured(line: Line) -> Measured:
    """The key of a line: case, provider, version and, for onepass, the hash of the kernels."""
    backend = line["provider"].removeprefix("onepass-")
    kernels = (line.get("sources") or {}).get(backend) if "onepass" in line["provider"] else None
    return (*results.case_key(line), line["provider"], line["provider_version"], kernels)


def _known(out: Path | None, device: Device) -> set[Measured]:
    """Keys of the lines for this device, in the committed file and in the output file."""
    paths = {results.ROOT / "bench" / "results" / FILES[device.type], out}
    lines = [line for path in paths if path is not None for line in results.read(path)]
    return {_measured(line) for line in lines if line["device"] == device.name}


def _lacking(
    case: Case, available: list[Provider], known: set[Measured], env: Line, device: Device
) -> list[Provider]:
    """The providers to measure: those that support a case and have no line for it.

    The preferred backend of onepass is measured together with them even if it has a line, because
    ratios are computed within one run.
    """

    def of(provider: Provider) -> Measured:
        key = (case.rule, case.dtype, case.weights, case.states, case.list.name)
        line = dict(zip(("rule", "param_dtype", "weights", "states", "list"), key, strict=True))
        return _measured(
            {**env, **line, "provider": provider.name, "provider_version": provider.version}
        )

    having = [p for p in available if not p.skips(case, device.type)]
    lacking = [p for p in having if of(p) not in known]
    ours = [p for p in having if p.name in ("onepass-cuda", "onepass-cpu") and p not in lacking]
    return [*ours, *lacking] if lacking else []


def _list(cases: Sequence[Case], available: list[Provider], missing: Missing) -> None:
    print("cases")
    for case in cases:
        print(f"  {case.name:<44} {case.bytes / 1e6:>10,.3f} MB per step")
    print("\nproviders")
    for provider in available:
        print(f"  {provider.name:<18} {provider.version}")
    for name, why in missing:
        print(f"  {name:<18} {why}")


def _run(
    cases: list[Case],
    available: list[Provider],
    missing: Missing,
    samples: int | None,
    out: Path | None,
    device: Device,
    known: set[Measured],
) -> int:
    env = results.environment(device.type)
    found: list[Line] = []
    wrong = False
    dirty = "*" if env["dirty"] else ""
    print(f"{env['device']}; torch {env['torch']}; commit {env['commit']}{dirty}")
    print(f"{table.LEGEND}\n\n{table.HEADER}")
    with results.Progress(sum(samples or case.samples for case in cases)) as progress:
        for case in cases:
            chosen = _lacking(case, available, known, env, device) if known else available
            if not chosen:
                continue

            def tick(text: str, name: str = case.name) -> None:
                progress.tick(f"{name}: {text}", text.startswith("sample"))

            outcome = run_case(case, chosen, samples, tick, device)
            new = results.lines(env, outcome)
            if out is not None:
                results.append(out, new)
            found += new
            wrong |= outcome.ours_failed
            progress.clear()
            print(f"\n{case.name}: {case.bytes / 1e6:,.3f} MB per step")
            print("\n".join(table.rows(outcome)), flush=True)
            if outcome.note:
                print(f"check: {outcome.note}")
            for name, why in outcome.skipped:
                if "memory" in why:
                    print(f"{name:<18} {why}")
            # Free the tensors of the case, which can take gigabytes.
            outcome.timed.clear()
            del outcome
            device.release()
    if missing:
        print("\nnot measured")
        for name, why in missing:
            print(f"{name:<18} {why}")
    print("\ntargets (AdamW)")
    for verdict in bars.judge(found, device.type):
        bar = verdict.bar
        print(f"{bar.text:<42} {verdict.shown:>7}  (target {bar.needed:g})  {verdict.result}")
    if out is not None:
        print(f"\n{len(found)} lines appended to {out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
