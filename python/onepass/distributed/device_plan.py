"""The part of a plan on one device whose parameters are DTensors."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from ..engine import backends
from ..engine.device_plan import DevicePlan, Tensors
from ..engine.hyper_table import RowTable
from ..engine.tensor_access import (
    are_plain,
    dtensor_type,
    has_memory,
    local_of,
    local_tensor,
    waited,
)

_placements, _mesh = attrgetter("placements"), attrgetter("device_mesh")

Moved = dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
"""Parameter -> (gradient with other placements than the parameter's, local tensor of the
redistributed gradient). All device plans of an optimizer share it until the step ends, so that each
rank redistributes a gradient once per step, however often the plan is rebuilt."""


class ShardedDevicePlan(DevicePlan):
    """A :class:`DevicePlan` whose entries are the local tensors of DTensors.

    Args:
        backend, entries, table: as for :class:`DevicePlan`.
        owners: the DTensors, in the order of entries.
        moved: see :data:`Moved`.
        options: keywords of the other base class, such as :class:`PagedDevicePlan`.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        owners: list[Any],
        *,
        moved: Moved,
        **options: Any,
    ) -> None:
        self._moved = moved
        self._placements, self._meshes = list(map(_placements, owners)), list(map(_mesh, owners))
        super().__init__(backend, entries, table, owners, **options)

    def _take(self) -> tuple[Tensors, Tensors] | None:
        kind = dtensor_type()
        found: list[Any] = [whole.grad for whole in self.owners]
        if not all(isinstance(grad, kind) for grad in found):
            return None
        params, grads = list(map(local_tensor, self.owners)), list(map(local_tensor, found))
        if not are_plain(grads):
            grads = list(map(waited, grads))
        places, meshes = list(map(_placements, found)), list(map(_mesh, found))
        if places != self._placements or meshes != self._meshes:
            for i, grad in enumerate(found):
                if places[i] != self._placements[i] or meshes[i] != self._meshes[i]:
                    if not has_memory(grads[i]):
                        return None
                    grads[i] = self._placed(self.owners[i], grad)
                    self._copied.append(local_of(grad))
        return self._readable(params, grads)

    def _placed(self, whole: Any, grad: Any) -> torch.Tensor:
        """The local tensor of a gradient after redistribution to its parameter's placements."""
        known = self._moved.get(whole)
        if known is None or known[0] is not grad:
            placed = grad.redistribute(whole.device_mesh, whole.placements)
            known = self._moved[whole] = grad, local_of(placed)
        return known[1]

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """See :meth:`DevicePlan.run`; afterwards drops the redistributed gradients."""
        super().run(verdict, switches)
        self._moved.clear()
