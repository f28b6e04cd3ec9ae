"""Where new states are made: small ones side by side in one storage.

Thousands of small allocations lie anywhere in memory, each with a storage object of its own, and a
step then mostly waits for them: 20,000 tensors of 256 elements took 1.4 times as long.
"""

from __future__ import annotations

import torch

SMALL = 1 << 14  # elements; a larger state has a storage of its own
ALIGNMENT = 16  # bytes: what a vector access of a GPU needs


class Arena:
    """Storages for the new states of one plan, made at their exact size when first taken from."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[torch.device, torch.dtype], int] = {}
        self._slabs: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}

    def want(self, param: torch.Tensor, dtype: torch.dtype) -> None:
        """Announces a state of this parameter; every :meth:`take` needs one before the first."""
        if param.numel() <= SMALL:
            key = (param.device, dtype)
            self._wanted[key] = self._wanted.get(key, 0) + _room(param.numel(), dtype)

    def take(self, param: torch.Tensor, dtype: torch.dtype, value: float) -> torch.Tensor:
        """A state with the parameter's shape and strides, filled with the value."""
        if param.numel() > SMALL:
            return torch.full_like(
                param.detach(), value, dtype=dtype, memory_format=torch.preserve_format
            )
        key = (param.device, dtype)
        if key not in self._slabs:
            self._slabs[key] = torch.zeros(self._wanted[key], dtype=dtype, device=param.device)
            self._used[key] = 0
        # Not a view: its version counter, and what it keeps alive, are its own storage's alone.
        state = torch.empty(0, dtype=dtype, device=param.device).set_(
            self._slabs[key].untyped_storage(), self._used[key], param.shape, param.stride()
        )
        self._used[key] += _room(param.numel(), dtype)
        return state.fill_(value) if value else state


def _room(numel: int, dtype: torch.dtype) -> int:
    unit = ALIGNMENT // dtype.itemsize
    return -(-numel // unit) * unit
