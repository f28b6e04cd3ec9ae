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
        self._copies = []
        if not self.relaid and self._read():
            return True
        grads = self._take()
        return grads is not None and self.backend.refresh(self.prepared, grads)

    def _read(self) -> bool:
        """Lets the backend take gradients as they are; False where it has to be given them."""
        return self.backend.read(self.prepared, self.params)

    def _take(self) -> list[torch.Tensor] | None:
        """Gradients, in the order in which parameters lie in memory; None if one has none."""
        grads = [grad for p in self.params if (grad := p.grad) is not None]
        if len(grads) < len(self.params):
            return None
        for i in self.relaid:
            copy = torch.empty_like(self.params[i], dtype=grads[i].dtype).copy_(grads[i])
            grads[i] = copy
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
