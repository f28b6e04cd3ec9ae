"""``python -m bench``: measures the steps on this machine's processor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import bars, results
from .cases import Case, all_cases, select
from .measure import Outcome, run_case
from .providers import PROVIDERS, Provider
from .results import Line


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 0 done, 1 a step of ours is wrong, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Times optimizer steps on the CPU, in turns."
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no file")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases with this in their name")
    parser.add_argument("--providers", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--samples", type=int, metavar="N", help="steps timed per provider")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="appended to (default bench/results/cpu.jsonl)"
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    parser.add_argument("--list", action="store_true", help="say what there is, measure nothing")
    args = parser.parse_args(argv)
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples must be at least 1; got {args.samples}")
    cases = select(all_cases(args.quick), args.cases)
    if not cases:
        parser.error(f"no case matches {args.cases!r}; --list names them")
    names = [provider.name for provider in PROVIDERS]
    wanted = args.providers.split(",") if args.providers else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no provider {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [provider for provider in PROVIDERS if provider.name in wanted]
    missing = [(p.name, why) for p in chosen if (why := p.unavailable())]
    available = [p for p in chosen if p.name not in dict(missing)]
    if args.list:
        _list(cases, available, missing)
        return 0

    out: Path | None = args.out or results.ROOT / "bench" / "results" / "cpu.jsonl"
    if args.no_write or (args.quick and args.out is None):
        out = None
    return _run(cases, available, missing, args.samples, out)


def _list(cases: Sequence[Case], available: list[Provider], missing: list[tuple[str, str]]) -> None:
    print("cases")
    for case in cases:
        print(f"  {case.name:<40} {case.bytes / 1e6:>10,.3f} MB a step")
    print("\nproviders")
    for provider in available:
        print(f"  {provider.name:<16} {provider.version}")
    for name, why in missing:
        print(f"  {name:<16} {why}")


def _run(
    cases: list[Case],
    available: list[Provider],
    missing: list[tuple[str, str]],
    samples: int | None,
    out: Path | None,
) -> int:
    env = results.environment()
    found: list[Line] = []
    outcomes: list[Outcome] = []
    total = sum(samples or case.samples for case in cases)
    with tqdm(total=total, disable=None, file=sys.stderr, unit="turn") as progress:
        for case in cases:

            def tick(text: str, name: str = case.name) -> None:
                progress.set_description(f"{name}: {text}", refresh=False)
                progress.update(text.startswith("sample"))

            outcome = run_case(case, available, samples, tick)
            new = results.lines(env, outcome)
            if out is not None:
                results.append(out, new)
            found += new
            outcomes.append(outcome)
            # Nothing of a case is kept: its steps hold on to gigabytes.
            outcome.timed.clear()
    _print(env, found, outcomes, missing)
    if out is not None:
        print(f"\n{len(found)} lines appended to {out}")
    return int(any(outcome.ours_failed for outcome in outcomes))


def _print(
    env: Line, found: list[Line], outcomes: list[Outcome], missing: list[tuple[str, str]]
) -> None:
    print(f"{env['device']}; torch {env['torch']}; commit {env['commit']}{'*' * env['dirty']}")
    print("ms: one step; GB/s: bytes of the formula / p50; extra: memory beyond what was there")
    print(
        f"\n{'provider':<16} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'GB/s':>8} "
        f"{'of copy':>8} {'host us':>10} {'extra MB':>9}"
    )
    for outcome in outcomes:
        print(f"\n{outcome.case.name}: {outcome.case.bytes / 1e6:,.3f} MB a step")
        for line in found:
            if results.case_key(line) == outcome.case.key:
                print(_row(line))
        for name, why in outcome.failed:
            print(f"{name:<16} WRONG, not timed: {why}")
        if outcome.note:
            print(f"checked: {outcome.note}")
    if missing:
        print("\nnot measured")
        for name, why in missing:
            print(f"{name:<16} {why}")
    print("\nbars (the other's time / ours, AdamW)")
    for verdict in bars.judge(found):
        ratio = "" if verdict.ratio is None else f"{verdict.ratio:.2f}"
        bar = verdict.bar
        print(f"{bar.text:<34} {ratio:>7}  (needs {bar.needed:g})  {verdict.result}")


def _row(line: Line) -> str:
    ms = line["ms"]
    host = "" if line["host_us"] is None else f"{line['host_us']:,.0f}"
    extra = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e6:,.1f}"
    return (
        f"{line['provider']:<16} {ms['p20']:>9.3f} {ms['p50']:>9.3f} {ms['p80']:>9.3f} "
        f"{line['gbps']:>8.2f} {line['share']:>8.2f} {host:>10} {extra:>9}"
    )


if __name__ == "__main__":
    sys.exit(main())
