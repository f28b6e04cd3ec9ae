"""The part of a plan that is on one device."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from . import backends
from .backends.base import same_layout
from .hyper_table import RowTable
from .tensor_access import are_plain, has_memory, unwrapped, zero

_NoTorchFunction = torch._C.DisableTorchFunctionSubclass

_grad = attrgetter("grad")

Tensors = list[torch.Tensor]


class DevicePlan:
    """The entries of one device, and the rows that they read.

    Args:
        owners: the parameters of the optimizer, in the order of entries, whose gradients are taken.

    Attributes:
        params, grads: plain tensors that :meth:`refresh` has taken, until the step is done.
        changed: whether the last :meth:`run` may have changed anything.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        owners: list[Any],
    ) -> None:
        self.backend, self.table, self.owners = backend, table, owners
        self.params: Tensors = []
        self.grads: Tensors = []
        self.changed = False
        self._copied: Tensors = []  # gradients of this step that were copied
        self._staged: Any = None
        self._ids = [entry.param_id for entry in entries]
        self._prepare(entries)
        # Gradients that a backend cannot read where they are: another order of the elements in
        # memory, or negated when they are read. They are copied at each step.
        self._relaid: list[int] = []
        found = self._take()
        assert found is not None
        self._relaid = [i for i, pair in enumerate(zip(*found, strict=True)) if not _alike(*pair)]
        self.forget_gradients()

    def _prepare(self, entries: list[backends.Entry]) -> None:
        self.prepared = self.backend.prepare(entries)

    # --- before anything changes ---

    def refresh(self) -> bool:
        """Takes the gradients; False, with nothing changed, if the plan is stale."""
        self.forget_gradients()
        with _NoTorchFunction():
            found = self._take()
            if found is None or not self._refresh(*found):
                return False
        self.params, self.grads = found
        return True

    def _refresh(self, params: Tensors, grads: Tensors) -> bool:
        return self.backend.refresh(self.prepared, params, grads)

    def _take(self) -> tuple[Tensors, Tensors] | None:
        """Parameters and gradients as a backend reads them; None if one has no gradient."""
        return self._readable(self.owners, list(map(_grad, self.owners)))

    def _readable(self, params: Tensors, found: Tensors) -> tuple[Tensors, Tensors] | None:
        """Unwraps and copies what a backend cannot read; None if a gradient is missing or has no
        memory to copy."""
        grads = found
        if not are_plain(found):
            if any(grad is None for grad in found):
                return None
            grads = [
                unwrapped(grad, f"parameter {i} of shape {tuple(grad.shape)}")
                for i, grad in zip(self._ids, found, strict=True)
            ]
            self._copied += [g for g, plain in zip(found, grads, strict=True) if g is not plain]
        for i in self._relaid:
            if not has_memory(grads[i]):  # torch would read it all the same
                return None
            self._copied.append(grads[i])
            grads[i] = torch.empty_like(params[i], dtype=grads[i].dtype).copy_(grads[i])
        return params, grads

    def forget_gradients(self) -> None:
        """Lets go of what :meth:`refresh` has taken."""
        self.params, self.grads, self._copied = [], [], []

    def norm(self) -> torch.Tensor:
        """See :meth:`Backend.norm`, of the gradients that refresh has taken."""
        return self.backend.norm(self.prepared)

    def stage(self, verdict: torch.Tensor | None) -> None:
        """Derives what can fail; see :meth:`Backend.stage`."""
        self._staged = self.backend.stage(self.table, verdict)

    def start(self) -> int:
        """Starts to bring paged states to the device; returns how many pages there are of them."""
        return 0

    # --- the step ---

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """The step over this device's entries.

        Args:
            verdict: on the device; None where nothing was asked.
            switches: the booleans of the step.
        """
        backend, table = self.backend, self.table
        if len(self.grads) != len(self.owners):
            raise RuntimeError("onepass: run without refresh")
        before, rule = table.kept[1:], table.rule
        if backend.launches and (rule.needs_first or rule.scalar_states):
            before = before.clone()
        self.changed = not backend.launches
        backend.advance(table, verdict, self._staged)
        try:
            self._sweep(switches)
        except BaseException:
            if backend.launches and not self.changed:
                backend.retreat(table, before)
            raise
        self.changed = True
        backend.count(table, self._staged)

    def zero_gradients(self, swept: bool) -> None:
        """Sets the gradients of the step to zero; swept: those that were not copied are."""
        for grad in self._copied if swept else (*self.grads, *self._copied):
            zero(grad)

    def _sweep(self, switches: backends.StepSwitches) -> None:
        table = self.table
        step = backends.StepArgs(table.hyper, table.counters, table.telemetry, switches)
        self.backend.run(self.prepared, step)


def _alike(param: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether a backend can read a gradient of this parameter where it is."""
    return same_layout(param, grad) and not grad.is_neg()
