"""The part of a plan that is on one device."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from ..formats import NATIVE
from . import backends
from .backends.base import same_layout
from .hyper_table import RowTable
from .joint_table import JointTable
from .tensor_access import are_plain, has_memory, unwrapped, zero

_NoTorchFunction = torch._C.DisableTorchFunctionSubclass

_grad = attrgetter("grad")

Tensors = list[torch.Tensor]


class WholeNorm:
    """The norm of entries that a plan divides over several sweeps, measured in one list.

    A divided list would add the squares in another order, which changes the last bits.

    Args:
        backend: the backend of the sweeps.
        entries: one for each parameter; their states, companions and averages are not read.
    """

    def __init__(self, backend: backends.Backend, entries: list[backends.Entry]) -> None:
        self._backend, self._entries = backend, entries
        self._prepared: Any = None  # made when it is needed first, because few optimizers clip

    def measure(self, params: Tensors, grads: Tensors) -> torch.Tensor:
        """The result of :meth:`Backend.norm` for the gradients of a step."""
        if self._prepared is None:
            self._prepared = self._backend.prepare([_bare(entry) for entry in self._entries])
        if not self._backend.refresh(self._prepared, params, grads):
            raise RuntimeError("onepass: a gradient changed within a step")
        return self._backend.norm(self._prepared)


def _bare(entry: backends.Entry) -> backends.Entry:
    """The entry without states and with the native weight format."""
    weight = NATIVE[entry.param.dtype]
    return replace(
        entry, states={}, scales={}, companion=None, ema=None, changed=None, weight=weight
    )


class DevicePlan:
    """The entries of one device and their hyperparameter table.

    Args:
        backend: the backend that runs the sweep.
        entries: one for each parameter.
        table: the hyperparameter table.
        owners: the optimizer's parameters in the order of entries; their gradients are read.

    Attributes:
        backend, table, owners: as given.
        params, grads: plain tensors that :meth:`refresh` stored for the current step.
        changed: whether the last :meth:`run` may have changed anything.
    """

    def __init__(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable | JointTable,
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
        # Gradients that a backend cannot read in place, because they have another memory order or
        # the negative bit. They are copied at each step.
        self._relaid: list[int] = []
        found = self._take()
        assert found is not None
        self._relaid = [i for i, pair in enumerate(zip(*found, strict=True)) if not _alike(*pair)]
        self.forget_gradients()

    def _prepare(self, entries: list[backends.Entry]) -> None:
        """Flattens the entries for the backend."""
        self.prepared = self.backend.prepare(entries)

    # --- before anything changes ---

    def refresh(self) -> bool:
        """Reads the gradients; returns False and changes nothing if the plan is stale."""
        self.forget_gradients()
        with _NoTorchFunction():
            found = self._take()
            if found is None or not self._refresh(*found):
                return False
        self.params, self.grads = found
        return True

    def _refresh(self, params: Tensors, grads: Tensors) -> bool:
        """Passes the gradients to the backend; False if its prepared plan is stale."""
        return self.backend.refresh(self.prepared, params, grads)

    def _take(self) -> tuple[Tensors, Tensors] | None:
        """Parameters and gradients as plain tensors; None if a gradient is missing."""
        return self._readable(self.owners, list(map(_grad, self.owners)))

    def _readable(self, params: Tensors, found: Tensors) -> tuple[Tensors, Tensors] | None:
        """Unwraps or copies gradients that a backend cannot read; None if a gradient is missing or
        has no memory."""
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
            if not has_memory(grads[i]):  # copy_ would read freed memory without an error
                return None
            self._copied.append(grads[i])
            grads[i] = torch.empty_like(params[i], dtype=grads[i].dtype).copy_(grads[i])
        return params, grads

    def forget_gradients(self) -> None:
        """Drops the tensors that :meth:`refresh` stored."""
        self.params, self.grads, self._copied = [], [], []

    def norm(self) -> torch.Tensor:
        """The result of :meth:`Backend.norm` for the gradients from :meth:`refresh`."""
        return self.backend.norm(self.prepared)

    def stage(self, verdict: torch.Tensor | None) -> None:
        """Computes the values of the step that can raise; see :meth:`Backend.stage`."""
        self._staged = [self.backend.stage(table, verdict) for table in self.table.parts]

    def start(self) -> int:
        """Starts to copy paged states to the device; returns the number of pages."""
        return 0

    def scratch(self) -> Tensors:
        """Memory that the plan keeps between steps, besides tables."""
        return []

    # --- the step ---

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """Runs the step over this device's entries.

        Args:
            verdict: the verdict on this device; None if the step has no verdict.
            switches: the booleans of the step.

        Raises:
            RuntimeError: :meth:`refresh` was not called.
        """
        backend, tables = self.backend, self.table.parts
        if len(self.grads) != len(self.owners):
            raise RuntimeError("onepass: run without refresh")
        before = [_history(table) if backend.launches else table.history for table in tables]
        self.changed = not backend.launches
        for table, staged in zip(tables, self._staged, strict=True):
            backend.advance(table, verdict, staged)
        try:
            self._sweep(switches)
        except BaseException:
            if backend.launches and not self.changed:
                for table, old in zip(tables, before, strict=True):
                    backend.retreat(table, old)
            raise
        self.changed = True
        for table, staged in zip(tables, self._staged, strict=True):
            backend.count(table, staged)

    def zero_gradients(self, swept: bool) -> None:
        """Sets the gradients of the step to zero.

        Args:
            swept: whether the sweep has already zeroed the gradients that were not copied.
        """
        for grad in self._copied if swept else (*self.grads, *self._copied):
            zero(grad)

    def _sweep(self, switches: backends.StepSwitches) -> None:
        """Runs the backend over the entries."""
        table = self.table
        step = backends.StepArgs(table.hyper, table.counters, table.telemetry, switches)
        self.backend.run(self.prepared, step)


def _history(table: RowTable) -> torch.Tensor:
    """The history of a table, copied if the step changes it."""
    changes = table.rule.needs_first or table.rule.scalar_states
    return table.history.clone() if changes else table.history


def _alike(param: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether a backend can read a gradient of this parameter in place."""
    return same_layout(param, grad) and not grad.is_neg()
