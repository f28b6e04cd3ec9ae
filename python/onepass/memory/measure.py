"""Measures the memory that real steps allocate, by category."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..optim import Optimizer
from .predict import block_of, category_of, storage_bytes
from .probes import resident_growth, step_temporary
from .report import Bytes
from .simulate import Make, state_bytes, with_gradients

STEPS = 3


class Measured(NamedTuple):
    """A measurement.

    Attributes:
        bytes: bytes by category.
        process_peak: bytes by which the resident set of the process grew in the last step; None on
            GPUs and on systems other than Linux.
    """

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
    """Takes real steps over new parameters and counts the allocated bytes.

    Held memory is the size of the storages of parameters, gradients and states. Temporary memory is
    the peak of a step minus the memory in use after the step. The peak comes from a profile of
    torch's CPU allocator, or from the statistics of the CUDA caching allocator.

    Args:
        make: parameters -> the optimizer.
        like: tensors with the shapes and dtypes of the parameters.
        grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
        device: "cpu" or "cuda".
        categorise: key of a state -> its category.
        snapshot: the file for the history of the CUDA caching allocator, which
            pytorch.org/memory_viz can display; None for no file.
        tick: called with a short text before each step.
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
                temporary = max(temporary, step_temporary(optimizer.step, where))
        if snapshot is not None:
            dump: Any = torch.cuda.memory._dump_snapshot
            dump(str(snapshot))
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    states = state_bytes(optimizer, categorise, block)
    if isinstance(optimizer, Optimizer):
        states |= _of_pager(optimizer, states, block)
        states["scratch"] = storage_bytes(optimizer.scratch(), block)
    found = Bytes(
        weights=storage_bytes(params, block),
        gradients=storage_bytes((p.grad for p in params if p.grad is not None), block),
        temporary=temporary,
        **states,
    )
    return Measured(found, process_peak)


def _of_pager(optimizer: Optimizer, states: dict[str, int], block: int) -> dict[str, int]:
    """Moves the bytes of paged states from their categories to the host, and adds the ring."""
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
