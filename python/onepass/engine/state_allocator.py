"""New states of small parameters on the CPU, side by side in memory.

Thousands of small allocations lie anywhere in memory, and a step then mostly waits for them: 20,000
tensors of 256 elements took 1.4 times as long. Each state still has a storage of its own, so that
saving, moving or dropping one does not involve its neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .state_layouts import Layout

SMALL = 1 << 14  # elements; a larger state is allocated alone
CUDA_BLOCK = 512  # bytes: torch's caching allocator hands out multiples of it
ALIGNMENT = 64  # bytes: a cache line, and a vector of AVX-512


class Arena:
    """Memory for the new states of one plan, allocated once and at its exact size.

    The memory is freed with the last state in it. Other devices than the CPU have allocators of
    their own for small tensors.
    """

    def __init__(self) -> None:
        self._wanted = 0
        self._memory: npt.NDArray[np.uint8] | None = None
        self._next = 0  # first free byte

    def want(self, layout: Layout, device: torch.device) -> None:
        """Announces a tensor; every :meth:`take` needs one before the first."""
        if _is_small(layout, device):
            self._wanted += _aligned(layout.nbytes)

    def take(self, layout: Layout, device: torch.device) -> torch.Tensor:
        """A tensor of this layout, filled with zeros."""
        if not _is_small(layout, device):
            return layout.empty(device).zero_()
        if self._memory is None:
            # More than is wanted, so that the first byte can be aligned.
            self._memory = np.zeros(self._wanted + ALIGNMENT, np.uint8)
            self._next = -self._memory.ctypes.data % ALIGNMENT
        # The storage of a tensor that frombuffer makes begins and ends with it.
        flat = torch.frombuffer(
            self._memory, dtype=layout.dtype, count=layout.numel, offset=self._next
        )
        self._next += _aligned(layout.nbytes)
        # Not a view of it, which would share its version counter.
        state = torch.empty(0, dtype=layout.dtype, device=device)
        return state.set_(flat.untyped_storage(), 0, layout.shape, layout.stride)


def allocated(nbytes: int, device: torch.device) -> int:
    """The bytes that a tensor takes of a device's memory."""
    block = CUDA_BLOCK if device.type == "cuda" else 1
    return -(-nbytes // block) * block


def _is_small(layout: Layout, device: torch.device) -> bool:
    return device.type == "cpu" and 0 < layout.numel <= SMALL


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
