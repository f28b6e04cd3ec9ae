"""The step inside torch.compile: one opaque op on the parameters and their gradients.

The op looks up its optimizer by a number and runs the ordinary step. States, counters and options
are not arguments: no other op in a graph reads them, and a changed option needs no recompilation.
torch.compile must not replay such an op in its own CUDA graphs (``mode="reduce-overhead"``), so the
op is tagged ``cudagraph_unsafe``.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch


class Steppable(Protocol):
    """The part of an optimizer's interface that the op uses."""

    param_groups: list[dict[str, Any]]

    def whole_step(self) -> None:
        """Runs the step without a closure and without hooks."""


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Steppable] = weakref.WeakValueDictionary()

_library: Any = torch.library.Library("onepass", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "optimizer_step(Tensor(a!)[] params, Tensor[] grads, int optimizer) -> ()",
    "optimizer_step_zeroing(Tensor(a!)[] params, Tensor(b!)[] grads, int optimizer) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))


def register(optimizer: Steppable) -> int:
    """Assigns the optimizer a number by which graphs find it; keeps only a weak reference."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def _step(params: list[torch.Tensor], grads: list[torch.Tensor], number: int) -> None:
    """Runs the step of the optimizer with this number on a graph's parameters and gradients."""
    optimizer = _optimizers[number]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    # A graph may pass copies of the parameters, and gradients that it computed itself.
    at = {p.data_ptr(): p for p in own if p.numel()}
    active = [p for p in own if p.grad is not None]
    if len(active) != len(params):
        raise RuntimeError(
            f"onepass: the step was compiled for {len(params)} parameters with gradients, but "
            f"{len(active)} have gradients now"
        )
    moved = [(p, q) for p, q in zip(active, params, strict=True) if at.get(q.data_ptr()) is not p]
    kept = [p.grad for p in active]
    with torch.no_grad():
        for p, q in moved:
            p.copy_(q)
        try:
            for p, grad in zip(active, grads, strict=True):
                if p.grad is not grad:
                    p.grad = grad
            optimizer.whole_step()
        finally:
            for p, old in zip(active, kept, strict=True):
                p.grad = old
        for p, q in moved:
            q.copy_(p)


for _name in ("optimizer_step", "optimizer_step_zeroing"):
    _library.impl(_name, _step, "CompositeExplicitAutograd")
    torch.library.register_fake(f"onepass::{_name}", lambda params, grads, number: None)
