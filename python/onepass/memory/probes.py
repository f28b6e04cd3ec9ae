"""Memory of a step and of a device, as torch's allocators and the kernel report it."""

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
    """Bytes of torch's CUDA allocator around a step.

    Attributes:
        before, after: in use before and after the step.
        peak: the most that was in use during the step.
    """

    before: int
    peak: int
    after: int


def cuda_allocated(step: Step) -> Allocated:
    """Takes a step on the current GPU and asks its allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return Allocated(before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())


def step_temporary(step: Step, device: torch.device) -> int:
    """Takes a step; the bytes that it allocated at its peak beyond those that it has kept."""
    if device.type == "cuda":
        found = cuda_allocated(step)
        return found.peak - found.after
    live = peak = 0
    for nbytes in _allocations(step):
        live += nbytes
        peak = max(peak, live)
    return peak - live


def step_growth(step: Step, device: torch.device) -> int | None:
    """Takes a step; the bytes that it needed at most beyond those in use before it.

    On a GPU of torch's allocator; on a CPU see :func:`resident_growth`.
    """
    if device.type == "cuda":
        found = cuda_allocated(step)
        return found.peak - found.before
    return resident_growth(step)


def _allocations(step: Step) -> list[int]:
    """What torch's CPU allocator hands out (above zero) and takes back, in order.

    By the older of torch's profilers: the newer one writes a line to stderr whenever it starts.
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
    """Takes a step; the bytes by which the process grew at most.

    This is the high-water mark of the resident set, so it covers every allocator. None where the
    kernel does not report it (Linux does). The kernel counts in batches: below about half a MiB the
    result is noise. The C library's free memory is given back first, since its reuse would not be
    seen.
    """
    before = None
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the mark is now the current size
            before = _status("VmRSS")
        except (AttributeError, OSError):
            pass
    step()
    return None if before is None else max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def free_memory(device: str) -> int | None:
    """Bytes that can still be allocated on a type of device; None where that is not known.

    On a GPU this includes what torch's allocator keeps for reuse.
    """
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept
    return free_host_memory()
