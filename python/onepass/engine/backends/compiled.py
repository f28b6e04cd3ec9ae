"""The common base of the cpu and cuda backends, whose plans are stored in the library."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ...rules import Rule
from .. import libraries
from .base import Backend, Entry, StepArgs


class _Prepared:
    """A plan inside a compiled library, freed together with this object."""

    def __init__(self, entries: Sequence[Entry], calls: Any) -> None:
        params = [entry.param for entry in entries]
        states = [tensor for entry in entries for tensor in entry.written()]
        spec = torch.tensor([entry.spec() for entry in entries], dtype=torch.int64, device="cpu")
        self.plan: torch.Tensor = calls.make_plan(params, states, spec)
        weakref.finalize(self, libraries.free_plan, calls, self.plan)


class CompiledBackend(Backend):
    """Makes one library call for the whole parameter list.

    Attributes:
        calls: the namespace of the library's ops.
    """

    calls: Any = torch.ops.onepass

    def lacks(self, rule: Rule) -> str:
        """See :meth:`Backend.lacks`; the library has the rules of onepass."""
        return "" if rule.options is None else f"it has no kernel for the custom rule {rule.name!r}"

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        """Builds the library's plan; see :meth:`Backend.prepare`."""
        return _Prepared(entries, self.calls)

    def refresh(
        self, prepared: _Prepared, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> bool:
        """See :meth:`Backend.refresh`."""
        try:
            return not self.calls.refresh(prepared.plan, params, grads)
        except NotImplementedError:
            # No kernel is registered for a gradient, for example a sparse one: the checks of a new
            # plan raise an error that names it.
            return False

    def run(self, prepared: _Prepared, step: StepArgs) -> None:
        """See :meth:`Backend.run`."""
        s = step
        self.calls.run(prepared.plan, s.hyper, s.counters, s.telemetry, s.switches.bits)

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        """See :meth:`Backend.norm`."""
        found: torch.Tensor = self.calls.norm(prepared.plan)
        return found
