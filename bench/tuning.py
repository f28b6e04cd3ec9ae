"""``python -m bench.tuning``: measures launch shape, chunk length and prefetch of the CUDA kernels.

``--build`` compiles the variants of tuning_variants.py into build/tuning/, which needs nvcc but no
GPU. Without it, each variant is measured in its own process, in two rounds with different orders. A
line is written as soon as a format is measured; a second call measures what has no line yet. Then
the bits of the fastest variant of each format are compared with bench/results/digests.jsonl.
``--report`` writes the tables of docs/cuda.md.

``--dry`` does all of this on a CPU with tiny sizes; copies of the CPU library replace the variants.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import onepass
from onepass_tools.benchmark.devices import DEVICES
from onepass_tools.benchmark.timing import percentile

from . import digest, results, sources, tuning_report
from .results import Line
from .tuning_build import build, compile_variant, copy_cpu_library
from .tuning_variants import (
    FOLDER,
    FORMATS,
    VARIANTS,
    Variant,
    digest_cases,
    library_of,
    source_hash,
    today,
)

ROUNDS = 2
AHEAD = 2
"""Number of processes that are started in advance, to import torch while another one measures."""
SECONDS = 120
"""Time limit of a process that measures, or compares bits."""
DRY_VARIANTS, DRY_FORMATS = 2, ("fp32", "split8+mx8")
VARIABLES = {"cuda": "ONEPASS_CUDA_LIBRARY", "cpu": "ONEPASS_CPU_LIBRARY"}


@dataclass(frozen=True)
class Setting:
    """The settings of a run.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        numel: elements of the tensor.
        samples: samples per format and round.
        formats: names of FORMATS.
        variants: the variants to measure.
        folder: folder of their libraries.
        out: file of the result lines.
        digests: file of the digests of the reference.
        built_of: hash of the sources that the libraries were built from.
    """

    device: str
    numel: int
    samples: int
    formats: tuple[str, ...]
    variants: tuple[Variant, ...]
    folder: Path
    out: Path
    digests: Path
    built_of: str

    def library(self, variant: Variant) -> Path:
        """Path of the library of a variant."""
        return library_of(variant, self.folder, self.built_of)

    def environ(self, variant: Variant) -> dict[str, str]:
        """The environment of a process that loads a variant, with the sources of this process."""
        here = [str(Path(onepass.__file__).resolve().parents[1]), str(results.ROOT)]
        paths = [*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        library = str(self.library(variant).resolve())
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths),
            VARIABLES[self.device]: library,
        }

    def lines(self, kind: str) -> list[Line]:
        """The existing lines of a kind with the same sources, device and size."""
        same = {"kind": kind, "built_of": self.built_of, "numel": self.numel}
        same["device"] = DEVICES[self.device].name
        return [x for x in results.read_lines(self.out) if same.items() <= x.items()]


@dataclass(frozen=True)
class Task:
    """A variant in a round, with the formats that have no line yet."""

    variant: Variant
    round: int
    formats: tuple[str, ...]


def tasks(setting: Setting) -> list[Task]:
    """The measurements without a line; each round has its own order. Rings come last, so that one
    that hangs does not take the time of the others."""
    done = {(x["variant"], x["round"], x["format"]) for x in setting.lines("tuning")}
    found = []
    for number in range(ROUNDS):
        order = random.Random(number).sample(setting.variants, len(setting.variants))
        for variant in sorted(order, key=lambda v: v.ring > 0):
            left = [f for f in setting.formats if (variant.name, number, f) not in done]
            if left:
                found.append(Task(variant, number, tuple(left)))
    return found


def _start(setting: Setting, task: Task) -> subprocess.Popen[str]:
    """Starts the process of a task; it imports its modules and waits for a line on stdin."""
    command = [sys.executable, "-m", "bench.tuning_step", "--device", setting.device]
    command += ["--formats", ",".join(task.formats), "--numel", str(setting.numel)]
    command += ["--samples", str(setting.samples)]
    return subprocess.Popen(
        command,
        cwd=results.ROOT,
        env=setting.environ(task.variant),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _measured(process: subprocess.Popen[str]) -> Iterator[Line]:
    """Tells a waiting process to measure, and yields each result as the process prints it."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write("go\n")
        process.stdin.close()
        for text in process.stdout:
            if text.startswith("{"):
                yield json.loads(text)
        process.wait()
    except BrokenPipeError:  # the process has already ended
        process.wait()
    finally:
        timer.cancel()


def _line(env: Line, setting: Setting, task: Task, found: Line) -> Line:
    variant, name = task.variant, found["format"]
    dtype, weights, states = FORMATS[name]
    p50, copy = (percentile(found[key], 50) for key in ("samples", "copy_samples"))
    gbps, copy_gbps = found["bytes"] / p50 / 1e6, found["copy_bytes"] / copy / 1e6
    return {
        **env,
        "kind": "tuning",
        "built_of": setting.built_of,
        "library": sources.library_hash(setting.library(variant)),
        "variant": variant.name,
        **{key.removeprefix("ONEPASS_").lower(): n for key, n in variant.macros.items()},
        "format": name,
        "rule": "adamw",
        "param_dtype": dtype,
        "weights": weights,
        "states": states,
        "numel": setting.numel,
        "round": task.round,
        "bytes": found["bytes"],
        "ms": {f"p{p}": round(percentile(found["samples"], p), 5) for p in (20, 50, 80)},
        "gbps": round(gbps, 4),
        "copy_gbps": round(copy_gbps, 4),
        "share": round(gbps / copy_gbps, 4),
        "samples": found["samples"],
        "copy_samples": found["copy_samples"],
    }


def measure(env: Line, setting: Setting, plan: Sequence[Task]) -> int:
    """Runs the processes one after the other and appends each line at once.

    Returns:
        The number of processes that failed.
    """
    failed = 0
    started: list[subprocess.Popen[str]] = []
    try:
        for number, task in enumerate(plan):
            while len(started) < min(number + 1 + AHEAD, len(plan)):
                started.append(_start(setting, plan[len(started)]))
            shares = []
            for found in _measured(started[number]):
                line = _line(env, setting, task, found)
                results.append(setting.out, [line])
                shares.append(f"{line['format']} {line['share']:.3f}")
            wrong = len(shares) < len(task.formats)
            failed += wrong
            end = f" FAILED: exit status {started[number].returncode}" if wrong else ""
            print(
                f"round {task.round + 1}: {task.variant.name}: {', '.join(shares)}{end}", flush=True
            )
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return failed


def check(setting: Setting, variant: Variant, name: str) -> tuple[str, str]:
    """Compares the bits of a variant with those of the reference.

    Returns:
        (verdict, output of bench.digest). The verdict is "equal", "differ", "failed", or "not
        compared" if the reference has no digests for the format.
    """
    command = [sys.executable, "-m", "bench.digest", "--device", setting.device, "--check"]
    command += ["--backends", setting.device, "--cases", digest_cases(name)]
    command += ["--against", str(setting.digests.resolve())]
    try:
        done = subprocess.run(
            command,
            cwd=results.ROOT,
            env=setting.environ(variant),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "failed", f"bench.digest did not finish within {SECONDS} s"
    counts = re.search(r"(\d+) differ, (\d+) have none, (\d+) failed", done.stdout)
    if counts is None or int(counts[3]):
        return "failed", done.stdout
    if int(counts[1]):
        return "differ", done.stdout
    if int(counts[2]) or done.returncode:
        return "not compared", done.stdout
    return "equal", done.stdout


def check_winners(env: Line, setting: Setting) -> int:
    """Compares the bits of the fastest variant of each format with those of the reference, and also
    the bits of each variant with a ring.

    Returns:
        The number of comparisons whose verdict is not "equal".
    """
    lines, wrong = setting.lines("tuning"), 0
    known = [x for x in setting.lines("tuning-winner") if x["verdict"] == "equal"]
    equal = {(x["format"], x["variant"]) for x in known}
    for name in setting.formats:
        fastest = tuning_report.medians(lines, name, [v.name for v in setting.variants])
        if not fastest:
            continue
        best = min(fastest, key=lambda key: fastest[key])
        for variant in setting.variants:
            if variant.name not in fastest or not (variant.name == best or variant.ring):
                continue
            told = f"{name}: {variant.name}{' is the fastest' * (variant.name == best)}"
            told += f", {fastest[variant.name]:.3f} ms"
            if (name, variant.name) in equal:
                print(f"{told}: bits equal (compared in an earlier run)", flush=True)
                continue
            verdict, output = check(setting, variant, name)
            wrong += verdict != "equal"
            line = {
                **env,
                "kind": "tuning-winner",
                "built_of": setting.built_of,
                "library": sources.library_hash(setting.library(variant)),
                "format": name,
                "variant": variant.name,
                "numel": setting.numel,
                "ms": round(fastest[variant.name], 5),
                "today": today(name).name,
                "today_ms": round(now, 5) if (now := fastest.get(today(name).name)) else None,
                "verdict": verdict,
                "output": output[-2000:],
            }
            results.append(setting.out, [line])
            print(f"{told}: bits {verdict}", flush=True)
            if verdict != "equal":
                print(output.rstrip(), flush=True)
    return wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tuning",
        description="Measures variants of the CUDA kernels' launch shape, chunk and prefetch.",
    )
    parser.add_argument(
        "--build", action="store_true", help="compile the variants, measure nothing"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the tables of docs/cuda.md, measure nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the variants, measure nothing")
    parser.add_argument(
        "--device", choices=["cuda"], default="cuda", help="device to measure (default cuda)"
    )
    parser.add_argument("--dry", action="store_true", help="do a tiny run on the CPU")
    parser.add_argument(
        "--variants", metavar="PATTERN", help="measure only these, for example '128x*-16K'"
    )
    parser.add_argument(
        "--formats",
        metavar="NAMES",
        help=f"formats to measure, separated by commas (default {','.join(FORMATS)})",
    )
    parser.add_argument(
        "--numel", type=int, metavar="N", help="number of elements (default 1e9; dry run 4096)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="per format and round (default 15; dry run 2)"
    )
    parser.add_argument(
        "--libraries",
        type=Path,
        metavar="DIR",
        help="folder of the variants' libraries (default build/tuning)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the result lines (default bench/results/tuning.jsonl)",
    )
    parser.add_argument(
        "--digests",
        type=Path,
        default=digest.FILE,
        metavar="FILE",
        help="file of the digests of the reference (default bench/results/digests.jsonl)",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=results.ROOT / "docs" / "cuda.md",
        metavar="FILE",
        help="page that --report updates (default docs/cuda.md)",
    )
    return parser


def _setting(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Setting:
    """The settings that the arguments select; exits with code 2 if an argument is invalid."""
    every = DRY_FORMATS if args.dry else tuple(FORMATS)
    formats = tuple(args.formats.split(",")) if args.formats else every
    if unknown := set(formats) - set(FORMATS):
        parser.error(
            f"--formats must be among {', '.join(FORMATS)}; got {', '.join(sorted(unknown))}"
        )
    for name in ("numel", "samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    chosen = [v for v in VARIANTS if args.variants is None or fnmatch(v.name, args.variants)]
    if not chosen:
        parser.error(f"--variants: no variant matches {args.variants!r}; --list prints them")
    dry = results.ROOT / "build" / "tuning-dry"
    kept = results.ROOT / "bench" / "results"
    return Setting(
        device="cpu" if args.dry else "cuda",
        numel=args.numel or (4096 if args.dry else 1_000_000_000),
        samples=args.samples or (2 if args.dry else 15),
        formats=formats,
        variants=tuple(chosen[:DRY_VARIANTS] if args.dry else chosen),
        folder=args.libraries or (dry if args.dry else FOLDER),
        out=args.out or (dry if args.dry else kept) / "tuning.jsonl",
        digests=args.digests,
        built_of=source_hash(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success; 1 if a build or a measurement failed, or the bits of a fastest variant are not
        known to equal the reference; 2 on wrong usage, without a GPU, or if variants are not built.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    setting = _setting(parser, args)
    if args.list:
        print("\n".join(v.name for v in setting.variants))
        return 0
    if args.report:
        return tuning_report.write(setting.out, args.docs)
    if args.build or args.dry:
        # Build all variants: building some would delete the others as stale.
        every = setting.variants if args.dry else VARIANTS
        failed = build(every, setting.folder, copy_cpu_library if args.dry else compile_variant)
        if failed or args.build:
            return int(failed > 0)
    if why := DEVICES[setting.device].unavailable():
        print(f"bench.tuning: {why}", file=sys.stderr)
        return 2
    if missing := [v for v in setting.variants if not setting.library(v).exists()]:
        print(
            f"bench.tuning: {len(missing)} of {len(setting.variants)} variants with the sources "
            f"{setting.built_of} are missing in {setting.folder}: run python -m bench.tuning "
            "--build",
            file=sys.stderr,
        )
        return 2
    env = results.environment(setting.device)
    plan = tasks(setting)
    print(f"{len(plan)} processes to run; lines are appended to {setting.out}", flush=True)
    failed = measure(env, setting, plan)
    wrong = check_winners(env, setting)
    print(
        f"{failed} processes failed; the bits of {wrong} fastest variants are not known to equal "
        "those of the reference"
    )
    return int(failed > 0 or wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
