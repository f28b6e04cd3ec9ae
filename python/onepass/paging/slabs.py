"""Host memory of paged states: large pinned slabs in which states are stored contiguously.

The small states of consecutive parameters then need only one copy.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.state_layouts import Layout

SLAB = 1 << 30
"""The largest size of a slab in bytes, unless a single tensor is larger."""
ALIGNMENT = 256  # bytes: alignment of every tensor in slabs and on the device
_PAGE = 4096  # bytes: granularity of pinning on the host

Pin = Callable[[int, int], Callable[[], None]]
_warned = False


def aligned(nbytes: int, unit: int = ALIGNMENT) -> int:
    """nbytes rounded up to a multiple of unit; by default, the space in a slab or a page."""
    return -(-nbytes // unit) * unit


class Slab:
    """A zero-filled block of host memory, which its tensors keep alive.

    Args:
        nbytes: size in bytes, rounded up to 4096.
        pin: see :meth:`Link.pin`.

    Attributes:
        address, nbytes: start address and size of the block.
    """

    def __init__(self, nbytes: int, pin: Pin) -> None:
        self.nbytes = -(-nbytes // _PAGE) * _PAGE  # two slabs never share a 4096-byte page
        whole = np.zeros(self.nbytes + _PAGE, np.uint8)
        self._start = -whole.ctypes.data % _PAGE
        self.address = whole.ctypes.data + self._start
        self._memory = weakref.ref(whole)
        self._kept: Any = whole
        try:
            unpin = pin(self.address, self.nbytes)
        except RuntimeError as error:
            _warn(error)
        else:
            # The driver unpins the memory when the process ends.
            weakref.finalize(whole, unpin).atexit = False

    @property
    def alive(self) -> bool:
        """Whether the memory is still allocated."""
        return self._memory() is not None

    def bytes(self, start: int, stop: int) -> torch.Tensor:
        """A uint8 tensor over a byte range of the slab, with a storage of exactly that range."""
        memory = self._memory()
        assert memory is not None
        return torch.from_numpy(memory[self._start + start : self._start + stop])

    def release(self) -> None:
        """Drops the slab's own reference, so that the memory is freed with its last tensor."""
        self._kept = None


def _warn(error: RuntimeError) -> None:
    """Warns, once per process, that host memory cannot be pinned."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"host memory for paged states cannot be pinned ({error}): results are correct, but "
            "copies are slow and do not overlap with the step. Raise `ulimit -l` or the memory "
            "limits of the container.",
            stacklevel=2,
        )


class Slabs:
    """Allocates host memory for states.

    Args:
        pin: see :meth:`Link.pin`.
    """

    def __init__(self, pin: Pin) -> None:
        self._pin = pin
        self._slabs: list[Slab] = []
        self._open: Slab | None = None
        self._used = 0  # bytes used of the open slab
        self._wanted = 0

    @property
    def room(self) -> int:
        """Bytes left in the open slab."""
        return self._open.nbytes - self._used if self._open else 0

    def want(self, nbytes: int) -> None:
        """Reserves space for the tensors of the following :meth:`take` calls.

        Args:
            nbytes: sum of the aligned sizes of the tensors.

        Raises:
            MemoryError: the machine has too little free memory.
        """
        free = free_memory()
        if free is not None and nbytes - self.room > free:
            raise MemoryError(
                f"paged states need {nbytes / 2**30:.2f} GiB of host memory; {free / 2**30:.2f} "
                "GiB are free on this machine: keep more states on the device with a larger budget "
                "(paged=...), or use a smaller format (states=...)"
            )
        self._wanted = nbytes

    def take(self, layout: Layout) -> torch.Tensor:
        """A zero-filled tensor of this layout with its own storage."""
        size = layout.nbytes
        room = aligned(size)
        if room > self.room:
            opened = Slab(max(room, min(self._wanted, SLAB)), self._pin)
            if self._open:
                self._open.release()
            # Register the slab before it is used, because an interrupt may occur at any line.
            self._slabs = [slab for slab in self._slabs if slab.alive] + [opened]
            self._open, self._used = opened, 0
        assert self._open is not None
        data = self._open.bytes(self._used, self._used + size)
        self._used += room
        self._wanted = max(self._wanted - room, 0)
        return data.view(layout.dtype).as_strided(layout.shape, layout.stride)

    def find(self, tensor: Any) -> tuple[Slab, int] | None:
        """The slab that contains a tensor, and the tensor's byte offset; None without a slab."""
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return None
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for slab in reversed(self._slabs):
            start = address - slab.address
            if size and start >= 0 and start + size <= slab.nbytes and slab.alive:
                return slab, start
        return None


def free_memory() -> int | None:
    """Bytes of free host memory within the container's limit; None if unknown."""
    found = [
        int(line.split()[1]) * 1024
        for line in _lines("/proc/meminfo")
        if line.startswith("MemAvailable:")
    ]
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _lines(f"/sys/fs/cgroup/{limit}"), _lines(f"/sys/fs/cgroup/{used}")
        if most and now and most[0].isdigit():
            stat = _lines(str(Path("/sys/fs/cgroup", used).with_name("memory.stat")))
            reclaimed = [int(x.split()[1]) for x in stat if x.startswith(f"{cache} ")]
            found.append(int(most[0]) - int(now[0]) + sum(reclaimed))
    return min(found) if found else None


def _lines(path: str) -> list[str]:
    """The lines of a file; empty if the file cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
