"""Result lines: files with one JSON object per case and provider."""

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
    "dirty",  # whether files differ from the commit; None if unknown
    "sources",  # hashes of the kernels' sources by backend: sources.py
    "library",  # hash of the built library
    "device",
    "clock_mhz",  # clock of a GPU's multiprocessors at the start of the run
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
    "ms",  # percentiles p20, p50, p80 of the samples
    "samples",  # step times in milliseconds
    "gbps",  # bytes / p50, in 1e9 bytes per second
    "copy_gbps",  # of the copy, interleaved with the steps
    "share",  # gbps / copy_gbps
    "host_us",  # p50 of the host time in microseconds; on a CPU only for one-element tensors
    "peak_bytes",  # largest additional memory during a step
)


def environment(device: str = "cpu") -> Line:
    """The fields that all lines of a run share.

    Args:
        device: "cpu", or "cuda" for the current GPU.
    """
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
    """The result lines of a case: one per provider and limit.

    Args:
        env: the result of :func:`environment`.
        outcome: the measurements of the case.
    """
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
    """Appends lines to a file; creates the file and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in new)


def read_lines(path: Path) -> list[Line]:
    """All lines of a file, of any kind; an empty list if the file does not exist.

    Raises:
        ValueError: a line is not JSON; the message names it.
    """
    found: list[Line] = []
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a JSON object: {error}") from None
    return found


def read(path: Path) -> list[Line]:
    """The lines of ``python -m bench`` in a file, without lines of other benchmarks."""
    # Lines from before December 2026 lack these fields.
    needed = set(FIELDS) - {"sources", "library", "clock_mhz"}
    return [x for x in read_lines(path) if x.keys() >= needed and "kind" not in x]


def case_key(line: Line) -> tuple[str, str, str, str, str]:
    """The key of a case: rule, dtype and format of the weights, format of the states, list."""
    return line["rule"], line["param_dtype"], line["weights"], line["states"], line["list"]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Progress:
    """A progress bar on stderr if stderr is a terminal and tqdm is installed; otherwise nothing.

    Args:
        total: number of turns.
    """

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
        """Shows the current activity; done: also counts one turn as finished."""
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)
            self._bar.update(done)

    def clear(self) -> None:
        """Removes the bar so that a line of output can be printed."""
        if self._bar is not None:
            self._bar.clear()


def origin(line: Line) -> str:
    """The date, commit and torch version of a line, in words."""
    dirty = " with uncommitted changes" if line["dirty"] else ""
    return f"{line['date']}, commit {str(line['commit'])[:12]}{dirty}, torch {line['torch']}"
