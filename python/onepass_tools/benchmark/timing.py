"""Times the providers of a case in turns.

A sample is the time of one call of ``step()`` with unchanged gradients: wall-clock time on a CPU,
device time on a GPU (devices.py). Every turn takes one sample of every provider and every limit, in
shuffled order, so that other load on the machine affects all of them equally.
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
    """The measurement of one provider or one limit in one case.

    Attributes:
        provider: the name of the provider or limit.
        version: the version of its package; for a limit, the version of torch.
        step: the function that is timed.
        bytes: bytes read and written by a step.
        peak_bytes: see :meth:`onepass_tools.benchmark.devices.Device.extra_memory`.
        host_us: the host time of a step in microseconds, if it differs from the step time or if the
            step consists only of host time; else None.
        samples: step times in milliseconds.
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
        """Bytes of a step by the formula, divided by the median time, in 1e9 bytes per second."""
        return self.bytes / percentile(self.samples, 50) / 1e6


@dataclass
class Outcome:
    """The result of a case.

    Attributes:
        case: the case.
        timed: the providers with correct results, and the limits.
        skipped: (provider, reason) for each provider that was not measured.
        failed: (provider, error) for each provider with a wrong result.
        ours_failed: whether a onepass provider failed.
        note: the elements for which the check was relaxed, and why; may be empty.
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
    """Checks and times every provider that supports the case.

    Args:
        case: the case to measure.
        providers: the installed providers.
        samples: the number of samples per provider; None for the default of the case.
        tick: called with a short text as progress is made.
        device: the device; None for the CPU.
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
            # The temporary memory of a step must fit while all providers are in memory.
            headroom = max(headroom, (device.extra_memory(timed.step) or 0) * 5 // 4)
            if (device.free() or 0) < headroom:
                timed = None
        if timed is not None:
            outcome.timed.append(timed)
        elif problem:
            outcome.failed.append((provider.name, problem))
            outcome.ours_failed |= provider.ours
        else:
            outcome.skipped.append(
                (provider.name, "does not fit in memory together with the others")
            )
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
    """Makes a provider with its own weights and checks its step.

    Returns:
        (the provider, an empty string), or (None, the error).

    Raises:
        torch.OutOfMemoryError: the provider does not fit in memory.
    """
    dtype = DTYPES[provider.dtype_in(case)]
    params = [torch.nn.Parameter(t) for t in case.list.empty(dtype, device.type)]
    # Gradients with the dtype of the case are shared by all providers.
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
    except Exception as error:  # third-party code can raise anything
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
    """The approximate memory of a case in bytes.

    For a provider, this is the memory of its weights and states, about half of the bytes that its
    step moves. For None, it is the memory of one onepass provider and of the shared tensors.
    """
    if provider is not None:
        return provider.bytes_in(case) // 2
    itemsize = DTYPES[case.dtype].itemsize
    shared = 2 * case.list.numel * itemsize  # weights to start from, and gradients
    return shared + max(_copied(case, device), 2 * BEYOND_CACHE) + case.bytes // 2


def _limits(case: Case, device: Device) -> list[Timed]:
    """The memory-bandwidth limits for the bytes of a case, half of them read and half written.

    "copy" is ``copy_`` from one buffer to another. A CPU also reads the cache lines that ``copy_``
    writes, and the byte formula does not count these reads. "in-place" is ``mul_`` by one, without
    such extra reads. An optimizer step has none either, so its bandwidth can exceed that of the
    copy. A GPU has no such extra reads.

    Each call works on the next window of buffers that are larger than the caches.
    """
    # Always fp32, because mul_ in bf16 is limited by arithmetic, not by memory bandwidth.
    half = _copied(case, device) // 2 // 4
    windows = -(-BEYOND_CACHE // (half * 4))
    # Write the buffers once: untouched pages all map to one shared zero page.
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
    """Takes the samples of all providers and limits, in turns."""
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(samples):
            # Shuffle, because in a rotation a provider always follows the same neighbour.
            for one in shuffle.sample(timed, len(timed)):
                device.prepare(one.step, one.host_us, not case.beyond_cache)
                one.samples.append(device.time(one.step))
                device.rest(one.own_threads)
            tick(f"sample {turn + 1} of {samples}")
    finally:
        gc.enable()


def percentile(values: list[float], percent: float) -> float:
    """The percentile of the values, with linear interpolation."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
