"""The cuda backend: one launch of the compiled sweep on an NVIDIA GPU for the whole list."""

from __future__ import annotations

import torch

from ...rules import CODES
from .. import libraries
from ..hyper_table import RowTable
from .base import Policy
from .compiled import CompiledBackend


class CudaBackend(CompiledBackend):
    """CUDA C++ kernels, compiled when onepass is built (csrc/cuda)."""

    name = "cuda"
    mixes_rules = False
    launches = True

    def unavailable(self, device: torch.device | None) -> str:
        """See :meth:`Backend.unavailable`; initialises CUDA only if there is a GPU."""
        if device is not None and device.type != "cuda":
            return "it supports CUDA devices only"
        missing = libraries.cuda_missing()
        if missing:
            return missing
        # Do not initialise CUDA on a machine without a GPU.
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if device is None:
            reasons = []
            for index in range(torch.cuda.device_count()):
                reasons.append(libraries.cuda_unsupported(index))
                if not reasons[-1]:
                    return ""
            return "; ".join(reasons)
        index = device.index
        if index is None:
            started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            index = torch.cuda.current_device() if started else 0
        return libraries.cuda_unsupported(index)

    def judge(
        self,
        verdict: torch.Tensor,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: Policy,
    ) -> None:
        """Computes the verdict in a kernel; see :meth:`Backend.judge`."""
        most = -1.0 if policy.max_norm is None else float(policy.max_norm)
        self.calls.judge(
            *(verdict, found, grad_scale, found_inf),
            *(most, policy.largest, policy.skip_nonfinite),
        )

    def stage(self, table: RowTable, verdict: torch.Tensor | None) -> None:
        """Does nothing: the kernel of :meth:`advance` reads counters on the GPU."""
        return None

    def advance(self, table: RowTable, verdict: torch.Tensor | None, staged: None) -> None:
        """Uploads changed options and runs a kernel; see :meth:`Backend.advance`."""
        table.upload()
        self.calls.advance(
            *(CODES[table.rule.name], table.options, table.kept),
            *(table.hyper, table.counters, verdict),
        )

    def count(self, table: RowTable, staged: None) -> None:
        """Does nothing: the kernel of :meth:`advance` has advanced the counters."""
