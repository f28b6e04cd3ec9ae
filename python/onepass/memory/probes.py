"""Memory of a step and of a device, as reported by torch's allocators and the OS kernel."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..paging.slabs import free_memory as free_host_memory

Step = Callable[[], Any]


class Allocated(NamedTuple):
    """Bytes in use in torch's CUDA allocator before, during and after a step.

    Attributes:
        before, after: bytes in use before and after the step.
        peak: the maximum number of bytes in use during the step.
    """

    before: int
    peak: int
    after: int


def cuda_allocated(step: Step) -> Allocated:
    """Takes a step on the current GPU and reads the statistics of its allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return Allocated(before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())


def step_temporary(step: Step, device: torch.device) -> int:
    """Takes a step; returns its peak bytes minus the bytes in use after the step."""
    if device.type == "cuda":
        found = cuda_allocated(step)
        return found.peak - found.after
    live = peak = 0
    for nbytes in _allocations(step):
        live += nbytes
        peak = max(peak, live)
    return peak - live


def step_growth(step: Step, device: torch.device) -> int | None:
    """Takes a step; returns its peak bytes minus the bytes in use before the step.

    On a GPU, the figures are those of torch's allocator. On a CPU, see :func:`resident_growth`.
    """
    if device.type == "cuda":
        found = cuda_allocated(step)
        return found.peak - found.before
    return resident_growth(step)


def _allocations(step: Step) -> list[int]:
    """The sizes of torch's CPU allocations (positive) and deallocations (negative), in order.

    The legacy profiler of torch is used, because the current one writes to stderr on each start.
    """
    from torch.autograd import profiler_legacy

    legacy: Any = profiler_legacy.profile
    with legacy(profile_memory=True) as profiler:
        step()
        records: Any = torch.autograd._disable_profiler_legacy()  # type: ignore[attr-defined]
        torch.autograd._enable_profiler_legacy(profiler.config())  # type: ignore[attr-defined]
    return [
        record.cpu_memory_usage()
        for thread in records
        for record in thread
        if record.kind() == "memory_alloc"
    ]


def resident_growth(step: Step) -> int | None:
    """Takes a step; returns the maximum growth of the process in bytes.

    The result is the high-water mark of the resident set minus its size before the step, so it
    covers every allocator. It is None on systems other than Linux. The Linux kernel counts in
    batches, so results below about 0.5 MiB are noise. Free memory of the C library is returned to
    the kernel before the step, because reuse of that memory would not be counted.
    """
    before = None
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            before = _status("VmRSS")
        except (AttributeError, OSError):
            pass
    step()
    return None if before is None else max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def free_memory(device: str) -> int | None:
    """Bytes that can still be allocated on a type of device; None if unknown.

    On a GPU this includes the memory that torch's caching allocator holds for reuse.
    """
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept
    return free_host_memory()
