"""Tracks the creation and destruction of tensor storages."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


@dataclass
class Entry:
    """A tracked storage.

    Attributes:
        nbytes: the size in bytes.
        device: the device type.
        born, died: times of creation and destruction, in seconds after the start of tracking;
            ``died`` is None while the storage exists.
        kinds: all categories under which the storage was entered.
    """

    nbytes: int
    device: str
    born: float
    died: float | None
    kinds: set[str]


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor with its own storage in a value.

    The search covers containers, the inner tensors of wrapper subclasses, and the attributes of
    other objects.
    """
    for leaf in tree_iter(value):
        if isinstance(leaf, torch.Tensor):
            if is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
                yield from plain_tensors([getattr(leaf, name) for name in names])
            else:
                yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, torch.nn.Module)):
            yield from (x for x in vars(leaf).values() if isinstance(x, torch.Tensor))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records every storage returned by an operation while it is active.

    Weak references track the storages, so the ledger keeps no storage alive. Memory that a kernel
    allocates and frees within one operation is not recorded.

    Args:
        ignored: device types whose storages are not recorded.
    """

    def __init__(self, ignored: Iterable[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Entry] = []
        self.live = self.peak = 0
        self._known: dict[int, tuple[Entry, Any]] = {}
        self._ignored = frozenset(ignored)
        self._start = time.perf_counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(result):
            self.enter(tensor)
        return result

    def enter(self, tensor: torch.Tensor, kind: str = "") -> None:
        """Records the storages of a tensor; adds ``kind``, if not empty, to their categories."""
        for part in plain_tensors(tensor):
            if part.device.type in self._ignored or part.layout != torch.strided:
                continue
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                now = time.perf_counter() - self._start
                entry = Entry(storage.nbytes(), part.device.type, now, None, set())
                self.entries.append(entry)
                self.live += entry.nbytes
                self.peak = max(self.peak, self.live)
                self._known[key] = entry, weakref.ref(storage, self._leaver(key))
            if kind:
                self._known[key][0].kinds.add(kind)

    def _leaver(self, key: int) -> Any:
        def leave(_: Any) -> None:
            entry, _ = self._known.pop(key)
            entry.died = time.perf_counter() - self._start
            self.live -= entry.nbytes

        return leave

    @property
    def now(self) -> float:
        """Seconds since the ledger was created."""
        return time.perf_counter() - self._start
