"""The DTensors of a plan on one device."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

import torch

from .. import backends
from ..backends.base import same_layout
from ..paging.part import PagedPart
from ..parts import Part
from ..rows import RowTable
from .shards import local_of

_local, _spec = attrgetter("_local_tensor"), attrgetter("_spec")
_NoTorchFunction = torch._C.DisableTorchFunctionSubclass

Moved = dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
"""Of parameters whose gradient had other placements: the gradient, and the local tensor of what was
made of it. All parts of an optimizer share it until the step is done, so that each rank moves a
gradient once in a step, however often it plans."""


class ShardedPart(Part):
    """A :class:`Part` whose entries are the local tensors of DTensors.

    Args:
        wholes: the DTensors, in the order of entries.
        moved: see :data:`Moved`.
        options: of the kind of part that this is beside.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        *,
        wholes: list[Any],
        moved: Moved,
        **options: Any,
    ) -> None:
        self._wholes, self._moved = wholes, moved
        super().__init__(backend, entries, table, **options)
        # As the gradients had them when they were last looked at.
        self._specs = [whole.grad._spec for whole in wholes]
        self._fitting = [self._is_placed(i) for i in range(len(wholes))]
        self._all_fit = all(self._fitting)
        self.relaid = [
            i
            for i, whole in enumerate(wholes)
            if self._fitting[i] and not same_layout(self.params[i], local_of(whole.grad))
        ]

    def _is_placed(self, i: int) -> bool:
        """Whether a gradient has the placements of its parameter."""
        spec, known = self._specs[i], self._wholes[i]._spec
        return bool(spec.placements == known.placements and spec.mesh == known.mesh)

    def _read(self) -> bool:
        # Asking each time whether a subclass has its own way would double the time of reading.
        with _NoTorchFunction():
            return self._all_fit and self.backend.read(
                self.prepared, self._wholes, self.params, self._specs
            )

    def _take(self) -> list[torch.Tensor] | None:
        wholes, params = self._wholes, self.params
        with _NoTorchFunction():
            found: list[Any] = [grad for whole in wholes if (grad := whole.grad) is not None]
        if len(found) < len(wholes) or not all(map(is_, map(_local, wholes), params)):
            return None
        specs, known = list(map(_spec, found)), self._specs
        self._specs = specs
        if specs != known:
            self._fitting = list(map(self._is_placed, range(len(specs))))
            self._all_fit = all(self._fitting)
        grads = list(map(_local, found))
        if not self._all_fit:
            for i, grad in enumerate(found):
                if not self._fitting[i]:
                    grads[i] = self._placed(wholes[i], grad)
                    self._copies.append(grads[i])
        if set(map(type, grads)) != {torch.Tensor}:
            grads = [grad.wait() if hasattr(grad, "wait") else grad for grad in grads]
        for i in self.relaid:
            grads[i] = torch.empty_like(params[i], dtype=grads[i].dtype).copy_(grads[i])
            self._copies.append(grads[i])
        return grads

    def _placed(self, whole: Any, grad: Any) -> torch.Tensor:
        """The local tensor of a gradient as its parameter is placed."""
        known = self._moved.get(whole)
        if known is None or known[0] is not grad:
            placed = grad.redistribute(whole.device_mesh, whole.placements)
            known = self._moved[whole] = grad, local_of(placed)
        local = known[1]
        param = local_of(whole)
        if not same_layout(param, local):
            local = torch.empty_like(param, dtype=local.dtype).copy_(local)
        return local

    def _end(self, zero_grads: bool) -> None:
        if zero_grads and (self._copies or not self._all_fit):
            copied = set(self.relaid)
            for i, whole in enumerate(self._wholes):
                if (i in copied or not self._fitting[i]) and whole.grad is not None:
                    local_of(whole.grad).zero_()
        self._copies = []
        self._moved.clear()


class PagedShards(ShardedPart, PagedPart):
    """Local tensors of DTensors, with states that are paged."""
