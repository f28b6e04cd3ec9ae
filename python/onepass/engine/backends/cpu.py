"""The cpu backend: the compiled sweep, one call for the whole list."""

from __future__ import annotations

import torch

from .. import libraries
from .compiled import CompiledBackend


class CpuBackend(CompiledBackend):
    """AVX-512, AVX2 or plain C++, picked at run time (:func:`onepass.ops.cpu_isa`).

    The sum of squares of its :meth:`norm` is within 20 * 2^-24 of its value, relatively: 2 KiB of a
    gradient are 17 additions of rounded squares in fp32, 18 of 16-bit elements; all else is in
    float64. It is the same on every instruction set and for any number of threads.
    """

    name = "cpu"

    def unavailable(self, device: torch.device | None) -> str:
        if device is not None and device.type != "cpu":
            return "it serves CPU tensors only"
        return libraries.missing
