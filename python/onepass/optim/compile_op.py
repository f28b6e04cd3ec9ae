"""A step inside torch.compile: one opaque op on the parameters and their gradients.

The op finds its optimizer by a number and takes the ordinary step. States, counters and options are
no arguments: nothing else in a graph reads them, and an option changed later counts without
compiling again. torch.compile must therefore not replay the op in a CUDA graph of its own, as with
``mode="reduce-overhead"``: the op is tagged so.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch


class Steppable(Protocol):
    """An optimizer, as far as the op needs it."""

    param_groups: list[dict[str, Any]]

    def whole_step(self) -> None:
        """The step, without closure or hooks."""


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Steppable] = weakref.WeakValueDictionary()

_library: Any = torch.library.Library("onepass", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "optimizer_step(Tensor(a!)[] params, Tensor[] grads, int optimizer) -> ()",
    "optimizer_step_zeroing(Tensor(a!)[] params, Tensor(b!)[] grads, int optimizer) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))


def register(optimizer: Steppable) -> int:
    """A new number by which graphs find the optimizer, as long as it is alive."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def _step(params: list[torch.Tensor], grads: list[torch.Tensor], number: int) -> None:
    optimizer = _optimizers[number]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    # A graph may hand in copies of both, and may have computed the gradients itself.
    at = {p.data_ptr(): p for p in own if p.numel()}
    active = [p for p in own if p.grad is not None]
    if len(active) != len(params):
        raise RuntimeError("onepass: compiled for other parameters with gradients than there are")
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
