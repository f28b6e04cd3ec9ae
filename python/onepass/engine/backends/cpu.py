"""The cpu backend: one call of the compiled sweep for the whole parameter list."""

from __future__ import annotations

import torch

from .. import libraries
from .compiled import CompiledBackend


class CpuBackend(CompiledBackend):
    """The sweep in AVX-512, AVX2 or plain C++, selected at run time (:func:`onepass.ops.cpu_isa`).

    The relative error of the sum of squares in :meth:`norm` is at most 20 * 2^-24. Each 2 KiB block
    of a gradient takes 17 fp32 additions of rounded squares, or 18 for 16-bit elements; the rest is
    float64. The sum does not depend on the instruction set or the number of threads.
    """

    name = "cpu"

    def unavailable(self, device: torch.device | None) -> str:
        """See :meth:`Backend.unavailable`; the library must be built."""
        if device is not None and device.type != "cpu":
            return "it supports CPU tensors only"
        return libraries.missing
