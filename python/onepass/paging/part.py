"""The part of a plan that is on one device, with states that are paged."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from .. import backends
from ..backends.base import same_layout
from ..formats import NATIVE
from ..parts import Part
from ..rows import RowTable, capturing
from .pager import Pager
from .pages import make_pages


class PagedPart(Part):
    """First the entries whose states stay, then one page after another, each a plan of its own.

    Args:
        entries: all of one device; the states of those that are paged are the host's.
        paged: parameters of entries whose states are.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        *,
        pager: Pager,
        paged: Collection[torch.Tensor],
    ) -> None:
        self._pager, self._all = pager, entries
        self._paged = [i for i, entry in enumerate(entries) if entry.param in paged]
        away = set(self._paged)
        self._resident = [i for i in range(len(entries)) if i not in away]
        super().__init__(backend, entries, table)

    def _prepare(self, entries: list[backends.Entry]) -> None:
        prepare, table = self.backend.prepare, self.table
        away = [entries[i] for i in self._paged]
        self._ring = self._pager.ring(entries[0].param.device)
        self._cuts = make_pages(away, self._pager.slabs, self._ring)
        self._pages = [made.page for made in self._cuts]
        # Of the entries whose states stay, if any, and of each page: what a backend made of it.
        self._rest = prepare([entries[i] for i in self._resident]) if self._resident else None
        self._made = [prepare(made.entries) for made in self._cuts]
        self._whole: Any = None  # of all, without states
        self._pieces = {s.entry for made in self._cuts for s in made.spans if not s.whole}
        self._tensors = [p for e in away for p in (e.param, *e.held())]
        self._known = self._properties()
        self._sums: torch.Tensor | None = None
        if table.telemetry is not None:
            self._sums = table.telemetry.new_zeros(len(self._made) + 1, *table.telemetry.shape)

    def _properties(self) -> list[Any]:
        """What tells of a tensor in new memory: pages hold views of the old."""
        tensors = self._tensors
        parts = [self.params[self._paged[i]] for i in self._pieces]
        return [*map(torch.Tensor.data_ptr, tensors), *((p.dtype, p.shape) for p in parts)]

    def refresh(self) -> bool:
        self._pager.check()
        if capturing():
            raise RuntimeError(
                "a step with paged states cannot be captured in a CUDA graph: its copies wait for "
                "those of the step before"
            )
        self._copies = []
        grads = self._take()
        if grads is None or self._properties() != self._known:
            return False
        take = self.backend.refresh
        if self._rest is not None and not take(self._rest, [grads[i] for i in self._resident]):
            return False
        grads = [grads[i] for i in self._paged]
        for i in self._pieces:
            param, grad = self.params[self._paged[i]], grads[i]
            if grad.layout != torch.strided or not same_layout(param, grad):
                return False
        return all(
            take(made, [span.of(grads[span.entry]) for span in piece.spans])
            for made, piece in zip(self._made, self._cuts, strict=True)
        )

    def norm(self) -> torch.Tensor:
        """As if no state was paged: its last bits depend on how a list is divided."""
        if self._whole is None:
            self._whole = self.backend.prepare([_bare(entry) for entry in self._all])
        grads = self._take()
        if grads is None or not self.backend.refresh(self._whole, grads):
            raise RuntimeError("onepass: a gradient changed within a step")
        return self.backend.norm(self._whole)

    def start(self) -> int:
        self._ring.start(self._pages)
        return len(self._pages)

    def run(self, verdict: torch.Tensor | None, zero_grads: bool) -> None:
        table, sums = self.table, self._sums

        def sweep(i: int) -> None:
            made = self._made[i] if i < len(self._made) else self._rest
            measured = None if sums is None else sums[i]
            self.backend.run(made, table.hyper, table.counters, zero_grads, measured)

        with self._pager.going():
            self.backend.advance(table, verdict)
            if self._rest is not None:
                sweep(len(self._made))
            self._ring.run(self._pages, sweep)
            if sums is not None and table.telemetry is not None:
                table.telemetry.copy_(sums.sum(0))
            self._end(zero_grads)


def _bare(entry: backends.Entry) -> backends.Entry:
    """An entry without states, for a norm; of any format that its weight can have."""
    weight = NATIVE[entry.param.dtype]
    return replace(entry, states={}, scales={}, companion=None, ema=None, weight=weight)
