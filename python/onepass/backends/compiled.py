"""What the backends of the compiled libraries share: a plan that the library holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..reader import GradientReader
from .base import Backend, Entry


class _Prepared:
    """A plan held by a library; freed with this object."""

    def __init__(self, entries: Sequence[Entry], calls: Any, library: Path) -> None:
        params = [entry.param for entry in entries]
        states = [tensor for entry in entries for tensor in entry.held()]
        spec = torch.tensor([entry.spec() for entry in entries], dtype=torch.int64)
        self.plan: torch.Tensor = calls.make_plan(params, states, spec)
        self.read = GradientReader(library, self.plan)
        weakref.finalize(self, ops.free_plan, calls, self.plan)


class CompiledBackend(Backend):
    """One call for the whole list.

    Attributes:
        calls: has the library's ops.
        library: where it is.
    """

    calls: Any = torch.ops.onepass
    library: Path

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        return _Prepared(entries, self.calls, self.library)

    def refresh(self, prepared: _Prepared, grads: list[torch.Tensor]) -> bool:
        try:
            return not self.calls.refresh(prepared.plan, grads)
        except NotImplementedError:
            # A gradient that the dispatch key does not cover, sparse for one: planning anew finds
            # it and says which.
            return False

    def read(
        self,
        prepared: _Prepared,
        tensors: list[torch.Tensor],
        locals: list[torch.Tensor] | None = None,
        specs: list[Any] | None = None,
    ) -> bool:
        return prepared.read(tensors, locals, specs)

    def run(
        self,
        prepared: _Prepared,
        hyper: torch.Tensor,
        counters: torch.Tensor,
        zero_grads: bool = False,
        telemetry: torch.Tensor | None = None,
    ) -> None:
        self.calls.run(prepared.plan, hyper, counters, zero_grads, telemetry)

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        found: torch.Tensor = self.calls.norm(prepared.plan)
        return found
