"""Measuring a case: providers one after the other in turns, each sample one ``step()``.

A sample is the time of one call of ``step()``, gradients unchanged: on the wall for the CPU, of the
device for a GPU (devices.py). Every turn takes a sample of every provider and of the limits, in an
order that is shuffled, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .cases import BEYOND_CACHE, DTYPES, Case
from .check import Expected
from .devices import DEVICES, Device, Step
from .provider import Provider

WARM_UP = 3
LIMITS = ("copy", "in-place")


@dataclass
class Timed:
    """One provider, or one limit, in one case.

    Attributes:
        provider: name.
        version: of its package; for a limit, of torch.
        step: what is timed.
        bytes: read and written by a step.
        peak_bytes: see :meth:`onepass_tools.benchmark.devices.Device.extra_memory`.
        host_us: what a step keeps the host, where that is not its time or is all of its time.
        samples: milliseconds.
        ours: as in Provider.
        own_threads: as in Provider.
    """

    provider: str
    version: str
    step: Step
    bytes: int
    peak_bytes: int | None = None
    host_us: float | None = None
    samples: list[float] = field(default_factory=list)
    ours: bool = False
    own_threads: bool = False

    @property
    def gbps(self) -> float:
        """Bytes of the formula per median time, in 1e9 bytes a second."""
        return self.bytes / percentile(self.samples, 50) / 1e6


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
    device: Device | None = None,
) -> Outcome:
    """Checks and times every provider that has the case.

    Args:
        case: what to measure.
        providers: those that are installed.
        samples: per provider; None takes the case's own number.
        tick: called with a few words whenever something was done.
        device: where; None is the CPU.
    """
    device = device or DEVICES["cpu"]
    outcome = Outcome(case)
    weights = case.list.normal(0.02, DTYPES[case.dtype], 1, device.type)
    grads = case.list.gradients(0.01, DTYPES[case.dtype], 2, device.type)
    expected = Expected(case, weights, grads)
    outcome.note = expected.note().removeprefix("; ")
    limits = _limits(case, device)
    headroom = 0
    for provider in providers:
        why = provider.skips(case, device.type)
        if why:
            outcome.skipped.append((provider.name, why))
            continue
        tick(f"checking {provider.name}")
        timed, problem, free = None, "", device.free()
        if free is None or free >= memory_of(case, device, provider) + headroom:
            with contextlib.suppress(torch.OutOfMemoryError):
                timed, problem = _prepare(case, provider, weights, grads, expected, device)
        if timed is not None and free is not None:
            # What its steps need beyond what it holds has to fit when all are there.
            headroom = max(headroom, (device.extra_memory(timed.step) or 0) * 5 // 4)
            if (device.free() or 0) < headroom:
                timed = None
        if timed is not None:
            outcome.timed.append(timed)
        elif problem:
            outcome.failed.append((provider.name, problem))
            outcome.ours_failed |= provider.ours
        else:
            outcome.skipped.append((provider.name, "does not fit in memory beside the others"))
            device.release()
    del weights
    outcome.timed += limits
    gc.collect()
    for timed in outcome.timed:
        for _ in range(WARM_UP):
            timed.step()
        if timed.provider not in LIMITS:
            timed.peak_bytes = device.extra_memory(timed.step)
            timed.host_us = device.host_us(timed.step)
    _sample(case, outcome.timed, samples or case.samples, tick, device)
    if not device.host_apart and case.list.scalars:
        for timed in outcome.timed:
            if timed.provider not in LIMITS:
                timed.host_us = percentile(timed.samples, 50) * 1e3
    return outcome


def _prepare(
    case: Case,
    provider: Provider,
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    expected: Expected,
    device: Device,
) -> tuple[Timed | None, str]:
    """The provider on weights of its own, checked; or None and what is wrong with it.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    dtype = DTYPES[provider.dtype_in(case)]
    params = [torch.nn.Parameter(t) for t in case.list.empty(dtype, device.type)]
    # Of the case's dtype they are shared by all providers.
    grads = [grad.to(dtype) for grad in grads]
    for param, weight, grad in zip(params, weights, grads, strict=True):
        param.data.copy_(weight)
        param.grad = grad
    try:
        step = provider.step(list(params), case, device.type)
        other_codes = case.states in provider.compared
        problem = expected.problem(step, params, grads, provider.slack, other_codes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a peer may fail in any way; the others are still measured
        first = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"
    if problem:
        return None, problem
    timed = Timed(provider.name, provider.version, step, provider.bytes_in(case))
    timed.ours, timed.own_threads = provider.ours, provider.own_threads
    return timed, ""


def _copied(case: Case, device: Device) -> int:
    """Bytes that a limit reads and writes."""
    return min(max(case.bytes, device.smallest_copy), device.largest_copy)


def memory_of(case: Case, device: Device, provider: Provider | None = None) -> int:
    """About how many bytes a case takes: what a provider holds, weights and states, which a step
    reads and writes; with None, of ours and of what the case needs beside it."""
    if provider is not None:
        return provider.bytes_in(case) // 2
    itemsize = DTYPES[case.dtype].itemsize
    shared = 2 * case.list.numel * itemsize  # weights to start from, and gradients
    return shared + max(_copied(case, device), 2 * BEYOND_CACHE) + case.bytes // 2


def _limits(case: Case, device: Device) -> list[Timed]:
    """What memory allows for the bytes of a case, half of them read and half written.

    "copy": ``copy_`` from one buffer to another. A processor reads the lines that it is about to
    write, which no formula counts. "in-place": ``mul_`` by one, which has no such reads; nor has an
    optimizer's step, which can therefore be above the copy. A GPU has no such reads at all.

    The windows move through buffers beyond the caches, whatever the size of the case.
    """
    # fp32 whatever the case's dtype: mul_ in bf16 is bound by its arithmetic, not by memory.
    half = _copied(case, device) // 2 // 4
    windows = -(-BEYOND_CACHE // (half * 4))
    # Written once: pages never written are all the same page of zeros.
    source = torch.ones(windows, half, device=device.type)
    target = torch.ones(windows, half, device=device.type)
    turn = dict.fromkeys(LIMITS, 0)

    def window(name: str) -> int:
        turn[name] = (turn[name] + 1) % windows
        return turn[name]

    def copy() -> None:
        i = window("copy")
        target[i].copy_(source[i])

    def in_place() -> None:
        source[window("in-place")].mul_(1.0)

    version = str(torch.__version__)
    steps: dict[str, Step] = {"copy": copy, "in-place": in_place}
    return [Timed(name, version, steps[name], 2 * half * 4) for name in device.limits]


def _sample(
    case: Case, timed: list[Timed], samples: int, tick: Callable[[str], None], device: Device
) -> None:
    """Fills the samples of all, in turns."""
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(samples):
            # Shuffled, not rotated: in a rotation everyone always follows the same neighbour.
            for one in shuffle.sample(timed, len(timed)):
                device.prepare(one.step, one.host_us, not case.beyond_cache)
                one.samples.append(device.time(one.step))
                device.rest(one.own_threads)
            tick(f"sample {turn + 1} of {samples}")
    finally:
        gc.enable()


def percentile(values: list[float], percent: float) -> float:
    """The value below which this share of the values lies, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
