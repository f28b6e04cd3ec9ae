"""What the backends of the compiled libraries share: a plan that the library holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import libraries
from .base import Backend, Entry, StepArgs


class _Prepared:
    """A plan held by a library; freed with this object."""

    def __init__(self, entries: Sequence[Entry], calls: Any) -> None:
        params = [entry.param for entry in entries]
        states = [tensor for entry in entries for tensor in entry.held()]
        spec = torch.tensor([entry.spec() for entry in entries], dtype=torch.int64, device="cpu")
        self.plan: torch.Tensor = calls.make_plan(params, states, spec)
        weakref.finalize(self, libraries.free_plan, calls, self.plan)


class CompiledBackend(Backend):
    """One call for the whole list.

    Attributes:
        calls: has the library's ops.
    """

    calls: Any = torch.ops.onepass

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        return _Prepared(entries, self.calls)

    def refresh(
        self, prepared: _Prepared, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> bool:
        try:
            return not self.calls.refresh(prepared.plan, params, grads)
        except NotImplementedError:
            # A gradient that no kernel is registered for, a sparse one for example: planning anew
            # finds it and says which.
            return False

    def run(self, prepared: _Prepared, step: StepArgs) -> None:
        s = step
        self.calls.run(prepared.plan, s.hyper, s.counters, s.telemetry, s.switches.bits)

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        found: torch.Tensor = self.calls.norm(prepared.plan)
        return found
