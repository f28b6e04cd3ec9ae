"""Measuring a case: providers one after the other in turns, each sample one ``step()``.

A sample is the wall-clock time of one call of ``step()``, gradients unchanged. Every turn takes a
sample of every provider and of the limits, in an order that is shuffled, so that what else the
machine does falls on all of them.
"""

from __future__ import annotations

import ctypes
import gc
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import BEYOND_CACHE, DTYPES, Case
from .check import Expected
from .providers import Provider

WARM_UP = 3
LIMITS = ("copy", "in-place")
SMALLEST_COPY = 64 << 20
"""Bytes read and written by a limit at least: fewer take too little time to be a bandwidth."""
PAUSE = 0.03
"""Seconds after a step on a foreign pool of threads: idle OpenMP threads spin for milliseconds
before they sleep, and would take a core from the next provider."""
REWARM = 0.003
"""Seconds of untimed steps before a sample of a case that fits in a cache."""

Step = Callable[[], Any]


@dataclass
class Timed:
    """One provider, or one limit, in one case.

    Attributes:
        provider: name.
        version: of its package; for a limit, of torch.
        step: what is timed.
        bytes: read and written by a step.
        peak_bytes: see :func:`extra_memory`.
        samples: milliseconds.
        ours: as in Provider.
        own_threads: as in Provider.
    """

    provider: str
    version: str
    step: Step
    bytes: int
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)
    ours: bool = False
    own_threads: bool = False


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        timed: those that are right, and the limits.
        skipped: (provider, why it has no part in the case).
        failed: (provider, what is wrong with it).
        ours_failed: whether one of the failed is ours.
        note: what the check did not require of every element.
    """

    case: Case
    timed: list[Timed] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    ours_failed: bool = False
    note: str = ""


def run_case(
    case: Case,
    providers: list[Provider],
    samples: int | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Checks and times every provider that has the case.

    Args:
        case: what to measure.
        providers: those that are installed.
        samples: per provider; None takes the case's own number.
        tick: called with a few words whenever something was done.
    """
    outcome = Outcome(case)
    weights = case.list.normal(0.02, DTYPES[case.dtype], seed=1)
    grads = case.list.normal(0.01, DTYPES[case.dtype], seed=2)
    expected = Expected(case, weights, grads)
    outcome.note = expected.note().removeprefix("; ")
    for provider in providers:
        why = provider.skips(case)
        if why:
            outcome.skipped.append((provider.name, why))
            continue
        tick(f"checking {provider.name}")
        timed, problem = _prepare(case, provider, weights, grads, expected)
        if timed is not None:
            outcome.timed.append(timed)
        else:
            outcome.failed.append((provider.name, problem))
            outcome.ours_failed |= provider.ours
    del weights
    outcome.timed += _limits(case)
    gc.collect()
    for timed in outcome.timed:
        for _ in range(WARM_UP):
            timed.step()
        if timed.provider not in LIMITS:
            timed.peak_bytes = extra_memory(timed.step)
    _sample(case, outcome.timed, samples or case.samples, tick)
    return outcome


def _prepare(
    case: Case,
    provider: Provider,
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    expected: Expected,
) -> tuple[Timed | None, str]:
    """The provider on weights of its own, checked; or None and what is wrong with it."""
    dtype = DTYPES[provider.dtype_in(case)]
    params = [torch.nn.Parameter(t) for t in case.list.empty(dtype)]
    # Of the case's dtype they are shared by all providers.
    grads = [grad.to(dtype) for grad in grads]
    for param, weight, grad in zip(params, weights, grads, strict=True):
        param.data.copy_(weight)
        param.grad = grad
    try:
        optimizer = provider.make(list(params), case)
        problem = expected.problem(optimizer.step, params, grads, provider.slack)
    except Exception as error:  # a peer may fail in any way; the others are still measured
        first = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"
    if problem:
        return None, problem
    timed = Timed(provider.name, provider.version, optimizer.step, provider.bytes_in(case))
    timed.ours, timed.own_threads = provider.ours, provider.own_threads
    return timed, ""


def _limits(case: Case) -> list[Timed]:
    """What memory allows for the bytes of a case, half of them read and half written.

    "copy": ``copy_`` from one buffer to another. The processor reads the lines that it is about to
    write, which no formula counts. "in-place": ``mul_`` by one, which has no such reads; nor has an
    optimizer's step, which can therefore be above the copy.

    The windows move through buffers beyond the caches, whatever the size of the case.
    """
    # fp32 whatever the case's dtype: mul_ in bf16 is bound by its arithmetic, not by memory.
    half = max(case.bytes, SMALLEST_COPY) // 2 // 4
    windows = -(-BEYOND_CACHE // (half * 4))
    # Written once: pages never written are all the same page of zeros.
    source = torch.ones(windows, half)
    target = torch.ones(windows, half)
    turn = dict.fromkeys(LIMITS, 0)

    def window(name: str) -> int:
        turn[name] = (turn[name] + 1) % windows
        return turn[name]

    def copy() -> None:
        i = window("copy")
        target[i].copy_(source[i])

    def in_place() -> None:
        source[window("in-place")].mul_(1.0)

    moved = 2 * half * 4
    version = str(torch.__version__)
    steps: dict[str, Step] = {"copy": copy, "in-place": in_place}
    return [Timed(name, version, steps[name], moved) for name in LIMITS]


def _sample(case: Case, timed: list[Timed], samples: int, tick: Callable[[str], None]) -> None:
    """Fills the samples of all, in turns."""
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(samples):
            # Shuffled, not rotated: in a rotation everyone always follows the same neighbour.
            for one in shuffle.sample(timed, len(timed)):
                if not case.beyond_cache:
                    _warm(one.step)
                start = time.perf_counter_ns()
                one.step()
                one.samples.append((time.perf_counter_ns() - start) / 1e6)
                if one.own_threads:
                    time.sleep(PAUSE)
            tick(f"sample {turn + 1} of {samples}")
    finally:
        gc.enable()


def _warm(step: Step) -> None:
    """Steps for REWARM seconds, at least one.

    In a loop of one optimizer's steps its tables are in a cache and torch's threads awake. Here the
    provider before it has evicted the tables and let the threads go to sleep.
    """
    start = time.perf_counter()
    step()
    while time.perf_counter() - start < REWARM:
        step()


def extra_memory(step: Step) -> int | None:
    """Bytes that the process needs at most during a step beyond what it had before it.

    The high-water mark of the resident set over the step, by any allocator; None where the kernel
    does not tell (it is Linux that does). The kernel counts in batches, so below about half a MiB
    it is noise. What the C library held free is given back first, or its reuse would not be seen.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the mark is now the current size
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def percentile(values: list[float], percent: float) -> float:
    """The value below which this share of the values lies, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
