"""The cuda backend: the compiled sweep of NVIDIA GPUs, one launch for the whole list."""

from __future__ import annotations

import torch

from ...rules import CODES
from .. import libraries
from ..hyper_table import RowTable
from .base import Policy
from .compiled import CompiledBackend


class CudaBackend(CompiledBackend):
    """CUDA C++, compiled when onepass was built (csrc/cuda)."""

    name = "cuda"
    extras = False
    launches = True

    def unavailable(self, device: torch.device | None) -> str:
        if device is not None and device.type != "cuda":
            return "it serves CUDA devices only"
        missing = libraries.cuda_missing()
        if missing:
            return missing
        # Without a GPU, CUDA is not initialised.
        if not torch.cuda.is_available():
            return "there is no GPU here"
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
        most = -1.0 if policy.max_norm is None else float(policy.max_norm)
        self.calls.judge(
            *(verdict, found, grad_scale, found_inf),
            *(most, policy.largest, policy.skip_nonfinite),
        )

    def stage(self, table: RowTable, verdict: torch.Tensor | None) -> None:
        return None

    def advance(self, table: RowTable, verdict: torch.Tensor | None, staged: None) -> None:
        table.upload()
        self.calls.advance(
            *(CODES[table.rule.name], table.options, table.kept),
            *(table.hyper, table.counters, verdict),
        )

    def count(self, table: RowTable, staged: None) -> None:
        """Nothing: the kernel of :meth:`advance` has counted."""
