"""What real steps allocate: asked of torch's allocators, and of the kernel."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..optim import Optimizer
from .predict import block_of, category_of, storage_bytes
from .report import Bytes
from .simulate import Make, state_bytes, with_gradients

STEPS = 3


class Measured(NamedTuple):
    """Bytes, and by how much the process's resident set grew in the last step (Linux CPUs)."""

    bytes: Bytes
    process_peak: int | None


def measure(
    make: Make,
    like: Sequence[torch.Tensor],
    grad_dtype: torch.dtype | None = None,
    device: str = "cpu",
    categorise: Callable[[str], str] = category_of,
    snapshot: Path | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Steps on new parameters and counts.

    What is held is the storages of parameters, gradients and states. What is temporary is, on a
    CPU, what its allocator handed out in a step beyond what was left when it ended; on a GPU the
    same of the caching allocator, by its statistics.

    Args:
        make: parameters -> the optimizer.
        like: shapes and dtypes of the parameters.
        grad_dtype: of the gradients; None takes that of each parameter.
        device: "cpu" or "cuda".
        categorise: key of a state -> its category.
        snapshot: where the caching allocator's history is written, for pytorch.org/memory_viz.
        tick: called with a few words before each step.
    """
    gc.collect()
    where = torch.device(device)
    block = block_of(where)
    if snapshot is not None:
        torch.cuda.memory._record_memory_history()
    try:
        params = with_gradients(like, where, grad_dtype)
        optimizer = make(params)
        temporary, process_peak = 0, None
        for step in range(STEPS):
            tick(f"step {step + 1} of {STEPS}")
            if step == STEPS - 1 and where.type == "cpu":
                process_peak = resident_growth(optimizer.step)
            else:
                temporary = max(temporary, _temporary(optimizer.step, where))
        if snapshot is not None:
            dump: Any = torch.cuda.memory._dump_snapshot
            dump(str(snapshot))
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    states = state_bytes(optimizer, categorise, block)
    if isinstance(optimizer, Optimizer):
        states |= _of_pager(optimizer, states, block)
    found = Bytes(
        weights=storage_bytes(params, block),
        gradients=storage_bytes((p.grad for p in params if p.grad is not None), block),
        temporary=temporary,
        **states,
    )
    return Measured(found, process_peak)


def _of_pager(optimizer: Optimizer, states: dict[str, int], block: int) -> dict[str, int]:
    """The ring of paged states, and those in its slabs moved from their category to the host."""
    if optimizer.pager is None:
        return {}
    moved = {"host": 0}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and optimizer.pager.slabs.find(value):
                nbytes = value.numel() * value.element_size()
                category = category_of(key)
                moved["host"] += nbytes
                moved[category] = (
                    moved.get(category, states[category]) - -(-nbytes // block) * block
                )
    rings = [ring.memory for ring in optimizer.pager.rings]
    return {**moved, "ring": storage_bytes(rings, block)}


def _temporary(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step has allocated at its peak beyond those that are left when it ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    live = peak = 0
    for nbytes in _allocations(step):
        live += nbytes
        peak = max(peak, live)
    return peak - live


def _allocations(step: Callable[[], Any]) -> list[int]:
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


def resident_growth(step: Callable[[], Any]) -> int | None:
    """Bytes that the process needs at most during a step beyond what it had before it.

    The high-water mark of the resident set, by any allocator; None where the kernel does not tell.
    It counts in batches, so below about half a MiB it is noise. What the C library held free is
    given back first, or its reuse would not be seen.
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
    """Bytes that can still be had on a device; None where that is not known."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    from ..paging.slabs import free_memory as of_the_host

    return of_the_host()
