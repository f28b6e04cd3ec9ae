"""Result lines: one JSON object per case and provider."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .measure import LIMITS, Outcome, Timed, percentile

ROOT = Path(__file__).parents[1]
Line = dict[str, Any]

FIELDS = (
    "date",  # of the run, UTC
    "commit",
    "dirty",  # sources differ from the commit
    "device",
    "driver",
    "cuda",
    "torch",
    "triton",
    "provider",
    "provider_version",
    "rule",
    "states",
    "weights",
    "param_dtype",
    "grad_dtype",
    "list",
    "numel",
    "tensors",
    "bytes",  # read and written by one step
    "ms",  # p20, p50, p80
    "samples",  # milliseconds
    "gbps",  # bytes / p50, 1e9 bytes per second
    "copy_gbps",  # of the copy in the same turns
    "share",  # gbps / copy_gbps
    "host_us",  # p50 over a list of one-element tensors, microseconds
    "peak_bytes",  # beyond what was there before the step
)


def environment(device: str = "cpu") -> Line:
    """What all lines of a run share; device: "cpu" or "cuda", the current one."""
    gpu = device == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")),
        "device": torch.cuda.get_device_name() if gpu else _device(),
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
    }


def lines(env: Line, outcome: Outcome) -> list[Line]:
    """The lines of a case."""
    copy = next(one for one in outcome.timed if one.provider == "copy")
    copy_gbps = _gbps(copy)
    return [_line(env, outcome.case, one, copy_gbps) for one in outcome.timed]


def _line(env: Line, case: Case, one: Timed, copy_gbps: float) -> Line:
    p50 = percentile(one.samples, 50)
    is_step = one.provider not in LIMITS
    line = {
        **env,
        "provider": one.provider,
        "provider_version": one.version,
        "rule": case.rule,
        "states": case.states,
        "weights": case.weights,
        "param_dtype": case.dtype,
        "grad_dtype": case.dtype,
        "list": case.list.name,
        "numel": case.list.numel,
        "tensors": len(case.list.shapes),
        "bytes": one.bytes,
        "ms": {f"p{p}": round(percentile(one.samples, p), 5) for p in (20, 50, 80)},
        "samples": [round(sample, 5) for sample in one.samples],
        "gbps": round(_gbps(one), 4),
        "copy_gbps": round(copy_gbps, 4),
        "share": round(_gbps(one) / copy_gbps, 4),
        "host_us": round(p50 * 1e3, 2) if case.list.scalars and is_step else None,
        "peak_bytes": one.peak_bytes,
    }
    return {name: line[name] for name in FIELDS}


def _gbps(one: Timed) -> float:
    return one.bytes / percentile(one.samples, 50) / 1e6


def append(path: Path, new: Iterable[Line]) -> None:
    """Appends lines to a file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in new)


def read_lines(path: Path) -> list[Line]:
    """Every line of a file, of any kind; none where there is no file.

    Raises:
        ValueError: a line that is not JSON; names it.
    """
    found: list[Line] = []
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
    return found


def read(path: Path) -> list[Line]:
    """The lines of the speed benchmark in a file; those of another kind are left out."""
    return [line for line in read_lines(path) if line.keys() >= set(FIELDS)]


def case_key(line: Line) -> tuple[str, str, str, str, str]:
    """What tells cases apart: rule, dtype and format of the weights, states, list."""
    return line["rule"], line["param_dtype"], line["weights"], line["states"], line["list"]


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Of the GPU, as nvidia-smi tells; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def _device() -> str:
    """The processor, its family and model (virtual machines hide the name), threads, ISA."""
    name, family, model = platform.processor() or platform.machine(), "", ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        found = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
        name = found.get("model name", name)
        family, model = found.get("cpu family", ""), found.get("model", "")
    numbers = f" (family {family} model {model})" if family and model else ""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{name}{numbers}, {threads}, {_isa()}"


def _isa() -> str:
    try:
        from onepass import ops

        return ops.cpu_isa()
    except (ImportError, RuntimeError):
        return "no compiled library"
