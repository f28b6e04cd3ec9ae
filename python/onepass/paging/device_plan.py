"""The part of a plan on one device, with paged states."""

from __future__ import annotations

from typing import Any

import torch

from ..engine import backends
from ..engine.backends.base import same_layout
from ..engine.device_plan import DevicePlan, Tensors, WholeNorm
from ..engine.hyper_table import RowTable, capturing
from ..engine.tensor_access import has_memory
from .pager import Pager
from .pages import make_pages


class PagedDevicePlan(DevicePlan):
    """A :class:`DevicePlan` that runs entries with resident states, then one page after another.

    The backend prepares the resident entries and each page as separate plans.

    Args:
        backend, table, owners: as for :class:`DevicePlan`.
        entries: all entries of one device; paged states are host tensors.
        pager: the pager of the optimizer.
        paged: positions of the entries with paged states.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        owners: list[Any],
        *,
        pager: Pager,
        paged: list[int],
    ) -> None:
        self._pager = pager
        self._paged, away = paged, set(paged)
        self._resident = [i for i in range(len(entries)) if i not in away]
        super().__init__(backend, entries, table, owners)

    def _prepare(self, entries: list[backends.Entry]) -> None:
        prepare, table = self.backend.prepare, self.table
        away = [entries[i] for i in self._paged]
        self._ring = self._pager.ring(entries[0].param.device)
        self._cuts = make_pages(away, self._pager.slabs, self._ring)
        self._pages = [made.page for made in self._cuts]
        # The backend's prepared plans: one for the resident entries, if any, and one for each page.
        self._rest = prepare([entries[i] for i in self._resident]) if self._resident else None
        self._made = [prepare(made.entries) for made in self._cuts]
        self._whole = WholeNorm(self.backend, entries)
        # Entries that are split over pages -> dtype and shape, to detect a replaced parameter.
        pieces = {s.entry for made in self._cuts for s in made.spans if not s.whole}
        self._pieces = {i: (away[i].param.dtype, away[i].param.shape) for i in pieces}
        # States on the host. Backends check only the pages' buffers, so refresh checks these.
        self._held = [tensor for entry in away for tensor in entry.held()]
        self._addresses = list(map(torch.Tensor.data_ptr, self._held))
        self._sums: torch.Tensor | None = None
        if table.telemetry is not None:
            self._sums = table.telemetry.new_zeros(len(self._made) + 1, *table.telemetry.shape)

    def refresh(self) -> bool:
        """See :meth:`DevicePlan.refresh`.

        Raises:
            RuntimeError: an earlier step failed halfway, or a CUDA graph is being captured.
        """
        self._pager.check()
        if capturing():
            raise RuntimeError(
                "a step with paged states cannot be captured in a CUDA graph: its copies wait for "
                "the copies of the previous step"
            )
        return super().refresh()

    def _refresh(self, params: Tensors, grads: Tensors) -> bool:
        if list(map(torch.Tensor.data_ptr, self._held)) != self._addresses:
            return False
        if not all(map(has_memory, self._held)):
            return False
        take = self.backend.refresh
        if self._rest is not None and not take(
            self._rest, [params[i] for i in self._resident], [grads[i] for i in self._resident]
        ):
            return False
        params, grads = ([tensors[i] for i in self._paged] for tensors in (params, grads))
        for i, known in self._pieces.items():
            param, grad = params[i], grads[i]
            if (param.dtype, param.shape) != known or grad.layout != torch.strided:
                return False
            if not same_layout(param, grad) or not has_memory(param) or not has_memory(grad):
                return False
        return all(
            take(
                made, *([s.of(tensors[s.entry]) for s in cut.spans] for tensors in (params, grads))
            )
            for made, cut in zip(self._made, self._cuts, strict=True)
        )

    def norm(self) -> torch.Tensor:
        """See :class:`WholeNorm`."""
        return self._whole.measure(self.params, self.grads)

    def start(self) -> int:
        """Starts to copy the first pages to the device; returns the number of all pages."""
        self._ring.start(self._pages)
        return len(self._pages)

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """See :meth:`DevicePlan.run`; after an error the pager refuses further steps."""
        with self._pager.going():
            super().run(verdict, switches)

    def _sweep(self, switches: backends.StepSwitches) -> None:
        table, sums = self.table, self._sums
        self.changed = True

        def sweep(i: int) -> None:
            made = self._made[i] if i < len(self._made) else self._rest
            measured = None if sums is None else sums[i]
            step = backends.StepArgs(table.hyper, table.counters, measured, switches)
            self.backend.run(made, step)

        if self._rest is not None:
            sweep(len(self._made))
        self._ring.run(self._pages, sweep)
        if sums is not None and table.telemetry is not None:
            table.telemetry.copy_(sums.sum(0))
