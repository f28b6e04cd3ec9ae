"""The cpu backend: the compiled sweep, one call for the whole list."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from .. import ops
from .base import Backend, Entry


class _Prepared:
    """A plan held by the library; freed with this object."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        params = [entry.param for entry in entries]
        states = [tensor for entry in entries for tensor in entry.held()]
        spec = torch.tensor([entry.spec() for entry in entries], dtype=torch.int64)
        self.plan: torch.Tensor = torch.ops.onepass.make_plan(params, states, spec)
        weakref.finalize(self, ops.free_plan, self.plan)


class CpuBackend(Backend):
    """AVX-512, AVX2 or plain C++, picked at run time (see :func:`onepass.ops.cpu_isa`)."""

    name = "cpu"
    # What Python has just touched of these tensors is then still in the L2 cache.
    chunk = 1024

    def unavailable(self, device: torch.device | None) -> str:
        if device is not None and device.type != "cpu":
            return "it serves CPU tensors only"
        return ops.missing

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        return _Prepared(entries)

    def refresh(self, prepared: _Prepared, grads: list[torch.Tensor], first: int) -> bool:
        try:
            return not torch.ops.onepass.refresh(prepared.plan, grads, first)
        except NotImplementedError:
            # A gradient that the CPU dispatch key does not cover, sparse for one: planning anew
            # finds it and says which.
            return False

    def run(
        self,
        prepared: _Prepared,
        hyper: torch.Tensor,
        counters: torch.Tensor,
        zero_grads: bool = False,
        telemetry: torch.Tensor | None = None,
    ) -> None:
        torch.ops.onepass.run(prepared.plan, hyper, counters, zero_grads, telemetry)

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        """One call: see :meth:`Backend.norm`.

        The sum of squares is within 20 * 2^-24 of its value, relatively: 2 KiB of a gradient are 17
        additions of rounded squares in fp32, 18 of 16-bit elements; all else is in float64. It is
        the same on every instruction set and for any number of threads.
        """
        found: torch.Tensor = torch.ops.onepass.norm(prepared.plan)
        return found
