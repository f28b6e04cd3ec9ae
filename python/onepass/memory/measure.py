"""What real steps allocate, by category."""

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
