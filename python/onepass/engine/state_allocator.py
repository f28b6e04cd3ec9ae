"""Allocates new states of small CPU parameters contiguously.

Thousands of separate small allocations are scattered in memory, and a step then waits mostly for
cache misses: a step over 20,000 tensors of 256 elements took 1.4 times as long. Each state still
has its own storage, so saving, moving or freeing a state does not affect its neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .state_layouts import Layout

SMALL = 1 << 14  # elements; a larger state is allocated alone
CUDA_BLOCK = 512  # bytes: torch's caching allocator rounds sizes up to a multiple of this
ALIGNMENT = 64  # bytes: the size of a cache line and of an AVX-512 vector


class Arena:
    """One allocation for the new CPU states of a plan, at the exact total size.

    The memory is freed together with its last state. Tensors on other devices are allocated
    separately, because those devices' allocators already group small tensors.
    """

    def __init__(self) -> None:
        self._wanted = 0
        self._memory: npt.NDArray[np.uint8] | None = None
        self._next = 0  # first free byte

    def want(self, layout: Layout, device: torch.device) -> None:
        """Reserves space for a tensor; all calls must precede the first :meth:`take`."""
        if _is_small(layout, device):
            self._wanted += _aligned(layout.nbytes)

    def take(self, layout: Layout, device: torch.device) -> torch.Tensor:
        """A tensor of this layout, filled with zeros."""
        if not _is_small(layout, device):
            return layout.empty(device).zero_()
        if self._memory is None:
            # The extra bytes allow the first tensor to be aligned.
            self._memory = np.zeros(self._wanted + ALIGNMENT, np.uint8)
            self._next = -self._memory.ctypes.data % ALIGNMENT
        # A tensor from frombuffer has a storage of exactly its own bytes.
        flat = torch.frombuffer(
            self._memory, dtype=layout.dtype, count=layout.numel, offset=self._next
        )
        self._next += _aligned(layout.nbytes)
        # A view would share the version counter of flat: make a new tensor on its storage.
        state = torch.empty(0, dtype=layout.dtype, device=device)
        return state.set_(flat.untyped_storage(), 0, layout.shape, layout.stride)


def allocated(nbytes: int, device: torch.device) -> int:
    """The bytes that a tensor of nbytes occupies on a device, after the allocator's rounding."""
    block = CUDA_BLOCK if device.type == "cuda" else 1
    return -(-nbytes // block) * block


def _is_small(layout: Layout, device: torch.device) -> bool:
    return device.type == "cpu" and 0 < layout.numel <= SMALL


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
