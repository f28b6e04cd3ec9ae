"""The part of a plan on one device whose groups are stepped by Muon or by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..engine import backends
from ..engine.device_plan import DevicePlan, Tensors, WholeNorm
from ..engine.hyper_table import GRAD, NONFINITE
from ..engine.joint_table import JointTable
from ..engine.tensor_access import is_dtensor
from ..formats import NATIVE
from ..numerics.verdict import SKIP
from ..rules.group_options import option
from ..rules.muon import RULE as MUON
from ..rules.sgd import RULE as SGD
from .batches import Direction, Directions, Settings
from .exchange import SharedDirections, sharding_of
from .matrices import matrices_of


class SweepTable:
    """What a sweep reads of a table: see :class:`onepass.engine.hyper_table.RowTable`."""

    def __init__(
        self, hyper: torch.Tensor, counters: torch.Tensor, like: torch.Tensor | None
    ) -> None:
        self.hyper, self.counters = hyper, counters
        # Of its own, because a sweep sets the telemetry of rows of other sweeps to zero.
        self.telemetry = None if like is None else torch.zeros_like(like)


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
        """Runs the sweep; afterwards ``changed`` is set, also if a later page failed."""
        self._sweep(switches)
        self.changed = True


MakeStage = Callable[[backends.Backend, list[backends.Entry], SweepTable, list[int]], Stage]
"""(backend, entries, table, owner of each entry) -> the stage, with paging if a state is paged."""


class MuonDevicePlan(DevicePlan):
    """A :class:`DevicePlan` with two sweeps and the products between them.

    The first sweep runs the rule ``muon`` over the matrices: it updates the momentum and writes
    the directions. The second runs SGD with decoupled weight decay over the matrices, with the
    orthogonalised directions as gradients, and AdamW over all other parameters. It is one launch,
    or one for each rule if the backend does not mix rules.

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
        self._skip = False
        super().__init__(backend, entries, table, owners, **options)

    def _prepare(self, entries: list[backends.Entry]) -> None:
        table = self.table
        rows = [table.positions[entry.row] for entry in entries]
        self._matrices = [i for i, entry in enumerate(entries) if entry.rule is MUON]
        self._span = table.spans.get(MUON, slice(0, 0))
        self.directions = self._make_directions(entries)
        # The sweep over the weights must not scale the directions as gradients.
        self._hyper = table.hyper.clone()
        first = [
            _momentum_entry(entries[i], rows[i], direction)
            for i, direction in zip(self._matrices, self.directions.tensors, strict=True)
        ]
        second = [
            _weight_entry(entry, row, group) if entry.rule is MUON else replace(entry, row=row)
            for entry, row, group in zip(entries, rows, self._groups, strict=True)
        ]
        make, backend, counters = self._make_stage, self.backend, table.counters
        self._first: Stage | None = None
        if first:
            swept = SweepTable(table.hyper, counters, table.telemetry)
            self._first = make(backend, first, swept, self._matrices)
        self._second = []
        for numbers in _launches(backend, second):
            swept = SweepTable(self._hyper, counters, table.telemetry)
            stage = make(backend, [second[i] for i in numbers], swept, numbers)
            self._second.append((numbers, stage))
        # A backend may prepare the entries of one rule only.
        self._whole = WholeNorm(self.backend, [_weight_entry(entry, 0, {}) for entry in entries])

    def _make_directions(self, entries: list[backends.Entry]) -> Directions | SharedDirections:
        """The memory of the directions; of DTensors, this rank's shards."""
        owners = [self.owners[i] for i in self._matrices]
        names = [
            f"parameter {entries[i].param_id} of shape {tuple(owner.shape)}"
            for i, owner in zip(self._matrices, owners, strict=True)
        ]
        sharding = None
        if owners and is_dtensor(owners[0]):
            sharding = sharding_of(owners, names)
        self._shared = sharding is not None
        found = []
        for i, owner, which in zip(self._matrices, owners, names, strict=True):
            whole = owner if self._shared else entries[i].param
            matrices = matrices_of(whole, self._groups[i], which)
            shape, stride = tuple(whole.shape), whole.stride()
            found.append(Direction(matrices, self._groups[i], shape, stride))
        device = entries[0].param.device
        if sharding is None:
            return Directions(found, self._settings, device)
        return SharedDirections(found, sharding, self._settings, device)

    def _refresh(self, params: Tensors, grads: Tensors) -> bool:
        directions, second = self.directions.tensors, list(grads)
        if self._first is not None and not self._first.give(
            directions, [grads[i] for i in self._matrices]
        ):
            return False
        for i, direction in zip(self._matrices, directions, strict=True):
            second[i] = direction
        return all(
            stage.give([params[i] for i in numbers], [second[i] for i in numbers])
            for numbers, stage in self._second
        )

    def forget_gradients(self) -> None:
        """See :meth:`DevicePlan.forget_gradients`."""
        super().forget_gradients()
        for stage in self._stages():
            stage.drop()

    def _stages(self) -> list[Stage]:
        """The sweeps in order."""
        second = [stage for _, stage in self._second]
        return second if self._first is None else [self._first, *second]

    def norm(self) -> torch.Tensor:
        """See :class:`WholeNorm`."""
        return self._whole.measure(self.params, self.grads)

    def scratch(self) -> Tensors:
        """See :meth:`DevicePlan.scratch`."""
        return self.directions.memory

    def start(self) -> int:
        """See :meth:`DevicePlan.start`."""
        return self._stages()[0].start()

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """See :meth:`DevicePlan.run`."""
        # On a GPU the products of a skipped step run on old directions, and no sweep reads them.
        # The ranks of DTensors must take part in the exchange, whatever the verdict of one is.
        self._skip = False
        if verdict is not None and verdict.device.type == "cpu" and not self._shared:
            self._skip = bool(verdict[SKIP])
        super().run(verdict, switches)

    def _sweep(self, switches: backends.StepSwitches) -> None:
        self._hyper.copy_(self.table.hyper)
        self._hyper[self._span, 0] = 1.0
        for stage in self._stages():
            stage.changed = False
        try:
            if self._first is not None:
                self._first.sweep(switches)
                if not self._skip:
                    self.directions.orthogonalize()
            for _, stage in self._second:
                stage.sweep(switches)
        finally:
            self.changed = self.changed or any(stage.changed for stage in self._stages())
        self._measure()

    def _measure(self) -> None:
        """Combines the telemetry of the sweeps: gradients of the first, weights of the second."""
        if self.table.telemetry is None:
            return
        sums = [_telemetry_of(stage) for stage in self._stages()]
        first = None if self._first is None else sums.pop(0)
        # Each row has the parameters of one rule, and so is zero in all second sweeps but one.
        second = torch.stack(sums).sum(0)
        if first is not None:
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
        changed=None,
        row=row,
    )


def _weight_entry(entry: backends.Entry, row: int, group: Mapping[str, Any]) -> backends.Entry:
    """The entry of the second sweep: SGD with decoupled weight decay and without momentum."""
    options = {
        "decoupled_weight_decay": True,
        "cautious_weight_decay": option(group, "cautious_weight_decay"),
        "momentum": 0.0,
        "nesterov": False,
    }
    return replace(
        entry,
        states={},
        scales={},
        rule=SGD,
        flags=SGD.flag_bits(options),
        row=row,
    )


def _telemetry_of(stage: Stage) -> torch.Tensor:
    """The telemetry of a sweep that measures."""
    found = stage.table.telemetry
    assert found is not None
    return found


def _launches(backend: backends.Backend, entries: list[backends.Entry]) -> list[list[int]]:
    """The entries of each launch: all of them, or those of each rule."""
    if backend.mixes_rules:
        return [list(range(len(entries)))]
    chosen: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        chosen.setdefault(entry.rule.name, []).append(i)
    return list(chosen.values())
