"""Result lines: one JSON object per case and provider."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from onepass.engine import libraries
from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.devices import DEVICES
from onepass_tools.benchmark.timing import Outcome, Timed, percentile

from . import sources

ROOT = sources.ROOT
Line = dict[str, Any]

FIELDS = (
    "date",  # of the run, UTC
    "commit",
    "dirty",  # files differ from the commit; None where nothing tells
    "sources",  # hashes of the kernels' sources by backend: sources.py
    "library",  # hash of the built library
    "device",
    "clock_mhz",  # of a GPU's multiprocessors, when the run began
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
    "host_us",  # p50, microseconds: of any list on a GPU; on a CPU of one-element tensors
    "peak_bytes",  # beyond what was there before the step
)


def environment(device: str = "cpu") -> Line:
    """What all lines of a run share; device: "cpu" or "cuda", the current one."""
    gpu = device == "cuda"
    found = DEVICES[device]
    commit, dirty = sources.commit_and_dirty()
    library = libraries.CUDA_LIBRARY if gpu else libraries.LIBRARY
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "sources": sources.kernel_hashes(),
        "library": sources.library_hash(library),
        "device": found.name,
        "clock_mhz": found.clock_mhz,
        "driver": found.driver,
        "cuda": torch.version.cuda if gpu else None,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
    }


def lines(env: Line, outcome: Outcome) -> list[Line]:
    """The lines of a case."""
    copy = next(one for one in outcome.timed if one.provider == "copy")
    return [_line(env, outcome.case, one, copy.gbps) for one in outcome.timed]


def _line(env: Line, case: Case, one: Timed, copy_gbps: float) -> Line:
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
        "gbps": round(one.gbps, 4),
        "copy_gbps": round(copy_gbps, 4),
        "share": round(one.gbps / copy_gbps, 4),
        "host_us": None if one.host_us is None else round(one.host_us, 2),
        "peak_bytes": one.peak_bytes,
    }
    return {name: line[name] for name in FIELDS}


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
    needed = set(FIELDS) - {
        "sources",
        "library",
        "clock_mhz",
    }  # lines before December 2026 lack them
    return [x for x in read_lines(path) if x.keys() >= needed and "kind" not in x]


def case_key(line: Line) -> tuple[str, str, str, str, str]:
    """What tells cases apart: rule, dtype and format of the weights, states, list."""
    return line["rule"], line["param_dtype"], line["weights"], line["states"], line["list"]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Progress:
    """A bar on standard error, where that is a terminal and tqdm is there."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and _version("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=total, file=sys.stderr, unit="turn")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def tick(self, text: str, done: bool) -> None:
        """Shows what goes on; done: one more of the total."""
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)
            self._bar.update(done)

    def clear(self) -> None:
        """Makes room for a line of output."""
        if self._bar is not None:
            self._bar.clear()


def origin(line: Line) -> str:
    """When and of what a line is, in words."""
    dirty = " with uncommitted changes" if line["dirty"] else ""
    return f"{line['date']}, commit {str(line['commit'])[:12]}{dirty}, torch {line['torch']}"
