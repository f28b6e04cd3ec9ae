"""The cuda backend: the compiled sweep of NVIDIA GPUs, one launch for the whole list."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from ..rows import RowTable
from .base import Backend, Entry, Policy


class _Prepared:
    """A plan held by the library; freed with this object."""

    def __init__(self, entries: Sequence[Entry], calls: Any) -> None:
        params = [entry.param for entry in entries]
        states = [tensor for entry in entries for tensor in entry.held()]
        spec = torch.tensor([entry.spec() for entry in entries], dtype=torch.int64)
        self.plan: torch.Tensor = calls.make_plan(params, states, spec)
        weakref.finalize(self, calls.free_plan, self.plan)


class CudaBackend(Backend):
    """CUDA C++, compiled when onepass was built (csrc/cuda)."""

    name = "cuda"
    chunk = 1024
    extras = False
    calls: Any = torch.ops.onepass

    def unavailable(self, device: torch.device | None) -> str:
        if device is not None and device.type != "cuda":
            return "it serves CUDA devices only"
        missing = ops.cuda_missing()
        if missing or torch.cuda.is_available():
            return missing
        return "there is no GPU here"

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        return _Prepared(entries, self.calls)

    def refresh(self, prepared: _Prepared, grads: list[torch.Tensor], first: int) -> bool:
        try:
            return not self.calls.refresh(prepared.plan, grads, first)
        except NotImplementedError:
            # A gradient that the dispatch key does not cover, sparse for one: planning anew finds
            # it and says which.
            return False

    def run(
        self,
        prepared: _Prepared,
        hyper: torch.Tensor,
        counters: torch.Tensor,
        zero_grads: bool = False,
        telemetry: torch.Tensor | None = None,
    ) -> None:
        self.calls.run(prepared.plan, hyper, counters, zero_grads, telemetry)

    def judge(
        self,
        verdict: torch.Tensor,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: Policy,
    ) -> None:
        most = -1.0 if policy.max_norm is None else float(policy.max_norm)
        self.calls.judge(
            *(verdict, found, grad_scale, found_inf),
            *(most, policy.largest, policy.skip_nonfinite),
        )

    def advance(self, table: RowTable, verdict: torch.Tensor | None) -> None:
        table.upload()
        self.calls.advance(
            *(table.rule.code, table.options, table.steps, table.fresh),
            *(table.hyper, table.counters, verdict),
        )

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        """float64 [3] on the device, without waiting for it: the sum of the squares of all
        gradients taken, their largest magnitude, how many are infinite or NaN."""
        found: torch.Tensor = self.calls.norm(prepared.plan)
        return found
