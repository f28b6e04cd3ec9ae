"""Counts the storages of tensors as they come and go, whatever makes them."""

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
    """A storage.

    Attributes:
        nbytes: of it.
        device: its type.
        born, died: seconds after the start; None while it lives.
        kinds: what it was found to be.
    """

    nbytes: int
    device: str
    born: float
    died: float | None
    kinds: set[str]


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a value that has a storage of its own: in containers, in subclasses of
    wrappers, and in the attributes of objects that are neither."""
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
    """While it is active, every storage that an operation returns is entered.

    Storages are followed by weak references, so that nothing is kept alive. What a kernel allocates
    and frees within one operation is not seen.

    Args:
        ignored: types of devices whose storages are left out.
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
        """Enters the storages under a tensor, and says what they are."""
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
        """Seconds since it was made."""
        return time.perf_counter() - self._start
