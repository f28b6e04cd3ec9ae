"""The part of a plan on one device whose groups are stepped by Muon or by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..engine import backends
from ..engine.device_plan import DevicePlan, Tensors
from ..engine.hyper_table import GRAD, NONFINITE
from ..engine.joint_table import JointTable
from ..formats import NATIVE, WEIGHT_FORMAT_OF_CODE
from ..numerics.verdict import SKIP
from ..rules.muon import RULE as MUON
from ..rules.sgd import RULE as SGD
from .batches import Direction, Directions, Settings
from .matrices import matrices_of


class SweepTable:
    """What a sweep reads of a table: see :class:`onepass.engine.hyper_table.RowTable`."""

    def __init__(
        self, hyper: torch.Tensor, counters: torch.Tensor, telemetry: torch.Tensor | None
    ) -> None:
        self.hyper, self.counters, self.telemetry = hyper, counters, telemetry


class Stage(DevicePlan):
    """One of the two sweeps of :class:`MuonDevicePlan`, over tensors that the plan passes on."""

    def __init__(
        self, backend: backends.Backend, entries: list[backends.Entry], table: Any, **options: Any
    ) -> None:
        self._given: tuple[Tensors, Tensors] = [], []
        super().__init__(backend, entries, table, [entry.param for entry in entries], **options)

    def _take(self) -> tuple[Tensors, Tensors]:
        return self._given

    def give(self, params: Tensors, grads: Tensors) -> bool:
        """Stores the tensors of a step; False if the plan is stale. See :meth:`refresh`."""
        self._given = params, grads
        return self.refresh()

    def drop(self) -> None:
        """Drops the tensors of a step."""
        self._given = [], []
        self.forget_gradients()

    def sweep(self, switches: backends.StepSwitches) -> None:
        """Runs the sweep."""
        self._sweep(switches)


MakeStage = Callable[[backends.Backend, list[backends.Entry], SweepTable, list[int]], Stage]
"""(backend, entries, table, owner of each entry) -> the stage, with paging if a state is paged."""


class MuonDevicePlan(DevicePlan):
    """A :class:`DevicePlan` with two sweeps and the products between them.

    The first sweep runs the rule ``muon`` over the matrices: it updates the momentum and writes
    the directions. The second runs SGD with decoupled weight decay over the matrices, with the
    orthogonalised directions as gradients, and AdamW over all other parameters.

    Args:
        backend, entries, table, owners: as for :class:`DevicePlan`.
        groups: the group of each entry.
        settings: the options of the products.
        make_stage: see :data:`MakeStage`.
        options: keywords of the other base class.
    """

    table: JointTable

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: JointTable,
        owners: list[Any],
        *,
        groups: list[dict[str, Any]],
        settings: Settings,
        make_stage: MakeStage,
        **options: Any,
    ) -> None:
        self._groups, self._settings, self._make_stage = groups, settings, make_stage
        self._all = entries
        self._skip = False
        super().__init__(backend, entries, table, owners, **options)

    def _prepare(self, entries: list[backends.Entry]) -> None:
        table = self.table
        device = entries[0].param.device
        rows = [table.positions[entry.row] for entry in entries]
        self._matrices = [i for i, entry in enumerate(entries) if entry.rule is MUON]
        self._span = table.spans.get(MUON, slice(0, 0))
        found = [self._direction(entries[i], self._groups[i]) for i in self._matrices]
        self.directions = Directions(found, self._settings, device)
        # The sweep over the weights must not scale the directions as gradients.
        self._hyper = table.hyper.clone()
        self._sums: list[torch.Tensor | None] = [None, None]
        if table.telemetry is not None:
            self._sums = [torch.zeros_like(table.telemetry) for _ in range(2)]
        first = [
            _momentum_entry(entries[i], rows[i], direction)
            for i, direction in zip(self._matrices, self.directions.tensors, strict=True)
        ]
        second = [
            _weight_entry(entry, row) if entry.rule is MUON else replace(entry, row=row)
            for entry, row in zip(entries, rows, strict=True)
        ]
        make, backend, counters = self._make_stage, self.backend, table.counters
        self._first: Stage | None = None
        if first:
            sums = SweepTable(table.hyper, counters, self._sums[0])
            self._first = make(backend, first, sums, self._matrices)
        sums = SweepTable(self._hyper, counters, self._sums[1])
        self._second = make(backend, second, sums, list(range(len(entries))))
        self._whole: Any = None  # the prepared plan of all entries without states, for norms

    @staticmethod
    def _direction(entry: backends.Entry, group: dict[str, Any]) -> Direction:
        """The direction of an entry."""
        param = entry.param
        which = f"parameter {entry.param_id} of shape {tuple(param.shape)}"
        matrices = matrices_of(param, group, which)
        return Direction(matrices, group, tuple(param.shape), param.stride())

    def _refresh(self, params: Tensors, grads: Tensors) -> bool:
        directions, second = self.directions.tensors, list(grads)
        if self._first is not None and not self._first.give(
            directions, [grads[i] for i in self._matrices]
        ):
            return False
        for i, direction in zip(self._matrices, directions, strict=True):
            second[i] = direction
        return self._second.give(params, second)

    def forget_gradients(self) -> None:
        """See :meth:`DevicePlan.forget_gradients`."""
        super().forget_gradients()
        for stage in self._stages():
            stage.drop()

    def _stages(self) -> list[Stage]:
        """The sweeps in order."""
        return [self._second] if self._first is None else [self._first, self._second]

    def norm(self) -> torch.Tensor:
        """Measures all gradients in one list, in the order of entries."""
        if self._whole is None:
            self._whole = self.backend.prepare([_bare(entry) for entry in self._all])
        if not self.backend.refresh(self._whole, self.params, self.grads):
            raise RuntimeError("onepass: a gradient changed within a step")
        return self.backend.norm(self._whole)

    def start(self) -> int:
        """See :meth:`DevicePlan.start`."""
        return self._stages()[0].start()

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """See :meth:`DevicePlan.run`."""
        # On a GPU the products of a skipped step run on old directions, and no sweep reads them.
        on_host = verdict is not None and verdict.device.type == "cpu"
        self._skip = on_host and verdict is not None and bool(verdict[SKIP])
        super().run(verdict, switches)

    def _sweep(self, switches: backends.StepSwitches) -> None:
        self._hyper.copy_(self.table.hyper)
        self._hyper[self._span, 0] = 1.0
        if self._first is not None:
            self._first.sweep(switches)
            self.changed = True
            if not self._skip:
                self.directions.orthogonalize()
        self._second.sweep(switches)
        self._measure()

    def _measure(self) -> None:
        """Combines the telemetry of the sweeps: gradients of the first, weights of the second."""
        first, second = self._sums
        if self.table.telemetry is None or first is None or second is None:
            return
        for column in (GRAD, NONFINITE):
            second[self._span, column] = first[self._span, column]
        self.table.telemetry.copy_(second[self.table.positions])


def _momentum_entry(entry: backends.Entry, row: int, direction: torch.Tensor) -> backends.Entry:
    """The entry of the first sweep, which writes a direction in place of the weight."""
    return replace(
        entry,
        param=direction,
        weight=NATIVE[direction.dtype],
        companion=None,
        ema=None,
        row=row,
        draws=entry.format.stochastic,
    )


def _weight_entry(entry: backends.Entry, row: int) -> backends.Entry:
    """The entry of the second sweep: SGD with decoupled weight decay and without momentum."""
    return replace(
        entry,
        states={},
        scales={},
        rule=SGD,
        flags=SGD.flag_bits(
            {"decoupled_weight_decay": True, "momentum": 0.0, "nesterov": False}
        ),
        row=row,
        draws=WEIGHT_FORMAT_OF_CODE[entry.weight].stochastic,
    )


def _bare(entry: backends.Entry) -> backends.Entry:
    """The entry of a norm: without states and with the native weight format."""
    return replace(
        entry,
        states={},
        scales={},
        companion=None,
        ema=None,
        weight=NATIVE[entry.param.dtype],
    )
