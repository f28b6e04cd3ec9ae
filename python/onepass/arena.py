"""Where new states are made: small ones side by side in one storage.

Thousands of small allocations lie anywhere in memory, each with a storage object of its own, and a
step then mostly waits for them: 20,000 tensors of 256 elements took 1.4 times as long.
"""

from __future__ import annotations

import torch

from .states import Layout

SMALL = 1 << 14  # elements; a larger state has a storage of its own
ALIGNMENT = 16  # bytes: what a vector access of a GPU needs


class Arena:
    """Storages for the new states of one plan, made at their exact size when first taken from."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[torch.device, torch.dtype], int] = {}
        self._slabs: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}

    def want(self, layout: Layout, device: torch.device) -> None:
        """Announces a tensor; every :meth:`take` needs one before the first."""
        if layout.numel <= SMALL:
            key = (device, layout.dtype)
            self._wanted[key] = self._wanted.get(key, 0) + _room(layout)

    def slab_bytes(self) -> list[int]:
        """Bytes of each storage that what was announced will take."""
        return [count * dtype.itemsize for (_, dtype), count in self._wanted.items()]

    def take(self, layout: Layout, device: torch.device) -> torch.Tensor:
        """A tensor of this layout, filled with zeros."""
        if layout.numel > SMALL:
            return layout.empty(device).zero_()
        key = (device, layout.dtype)
        if key not in self._slabs:
            self._slabs[key] = torch.zeros(self._wanted[key], dtype=layout.dtype, device=device)
            self._used[key] = 0
        # Not a view: its version counter, and what it keeps alive, are its own storage's alone.
        state = torch.empty(0, dtype=layout.dtype, device=device).set_(
            self._slabs[key].untyped_storage(), self._used[key], layout.shape, layout.stride
        )
        self._used[key] += _room(layout)
        return state


def _room(layout: Layout) -> int:
    unit = ALIGNMENT // layout.dtype.itemsize
    return -(-layout.numel // unit) * unit
