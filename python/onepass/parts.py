"""The part of a plan that is on one device."""

from __future__ import annotations

import torch

from . import backends
from .backends.base import same_layout
from .rows import RowTable


class Part:
    """The entries of one device, and the rows that they read."""

    def __init__(
        self, backend: backends.Backend, entries: list[backends.Entry], table: RowTable
    ) -> None:
        self.backend, self.table = backend, table
        self.params = [entry.param for entry in entries]
        # Gradients that lie in memory in another order than their parameter are copied for a step.
        self.relaid = [
            i for i, p in enumerate(self.params) if p.grad is None or not same_layout(p, p.grad)
        ]
        self._copies: list[torch.Tensor] = []
        self._prepare(entries)

    def _prepare(self, entries: list[backends.Entry]) -> None:
        self.prepared = self.backend.prepare(entries)

    def refresh(self) -> bool:
        """Reads the gradients; False, with nothing changed, when the plan is no longer true."""
        count = len(self.params)
        chunk = self.backend.chunk or count
        self._copies = []
        for first in range(0, count, chunk):
            grads = self._take(first, first + chunk)
            if grads is None or not self.backend.refresh(self.prepared, grads, first):
                return False
        return True

    def _take(self, first: int, stop: int) -> list[torch.Tensor] | None:
        """Gradients of some parameters, in the order in which these lie; None if one has none."""
        part = self.params[first:stop]
        grads = [grad for p in part if (grad := p.grad) is not None]
        if len(grads) < len(part):
            return None
        for i in self.relaid:
            if first <= i < stop:
                grad = grads[i - first]
                copy = torch.empty_like(self.params[i], dtype=grad.dtype).copy_(grad)
                grads[i - first] = copy
                self._copies.append(copy)
        return grads

    def norm(self) -> torch.Tensor:
        """See :meth:`Backend.norm`, of the gradients that refresh has taken."""
        return self.backend.norm(self.prepared)

    def start(self) -> int:
        """Starts to bring paged states to the device; returns how many pages there are of them."""
        return 0

    def run(self, verdict: torch.Tensor | None, zero_grads: bool) -> None:
        """The step over this device's entries."""
        table = self.table
        self.backend.advance(table, verdict)
        self.backend.run(self.prepared, table.hyper, table.counters, zero_grads, table.telemetry)
        self._end(zero_grads)

    def _end(self, zero_grads: bool) -> None:
        if zero_grads and self._copies:
            for i in self.relaid:
                grad = self.params[i].grad
                if grad is not None:
                    grad.zero_()
        self._copies = []
