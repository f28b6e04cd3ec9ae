"""The record of changed weights of an optimizer: one bit per weight, and version counters.

A step sets the bits of the weights whose stored bits it changes. A write from outside of a step
moves the version counter of the parameter: the parameter is then changed throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .backends.base import WORD
from .plan_request import ParamView, Tally
from .weight_checksum import checksum


class _Seen(NamedTuple):
    """Properties of a local tensor that change when it is replaced."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _seen(local: torch.Tensor) -> _Seen:
    """The properties of a local tensor."""
    address = local.data_ptr() if local.numel() else 0
    return _Seen(address, tuple(local.shape), local.stride(), local.dtype, local.device)


class Tracked:
    """The record of one parameter.

    Args:
        view: the part of the parameter that this rank has.
        whole: whether the parameter counts as changed throughout from the start.

    Attributes:
        bits: int32, one bit per weight in memory order; None if no step has tracked the parameter.
        whole: whether the parameter is changed throughout.
        start: the checksum of this rank's part before the first change; None if ``whole``.
    """

    def __init__(self, view: ParamView, whole: bool) -> None:
        self.bits: torch.Tensor | None = None
        self.start: int | None
        self._tally, self._own = Tally(), 0
        self._seen = _seen(view.local)
        self._outside = self._writes(view)
        place = view.place()
        self.whole, self.start = whole, None
        if not whole:
            self.start = checksum(view.local, place) if place.owned else 0

    def _writes(self, view: ParamView) -> int | None:
        """The number of writes that no tracked step made; None without a version counter."""
        holder, local = view.version_holder(), view.local
        if holder.is_inference() or local.is_inference():
            return None
        seen = local._version if holder is local else holder._version + local._version
        return seen - self._own - self._tally.count

    def begin(self, tally: Tally) -> None:
        """Counts the steps of a new plan, which replaces the plan before."""
        self._own += self._tally.count
        self._tally = tally

    def look(self, view: ParamView) -> None:
        """Sets :attr:`whole` if the parameter was replaced or written from outside."""
        seen, writes = _seen(view.local), self._writes(view)
        if seen != self._seen or writes is None or writes != self._outside:
            self.whole = True
        self._seen, self._outside = seen, writes

    def bits_for(self, local: torch.Tensor) -> torch.Tensor:
        """The bits for the steps of a new plan; new and zero if the size or device changed."""
        words = -(-local.numel() // WORD)
        if self.bits is None or len(self.bits) != words or self.bits.device != local.device:
            self.bits = torch.zeros(words, dtype=torch.int32, device=local.device)
        return self.bits

    def clear(self) -> None:
        """Starts anew after all changes were taken."""
        self.whole, self.start = False, None


class ChangeRecord:
    """The record of changed weights of an optimizer.

    Attributes:
        chain: the name of the chain of patches; empty before the first one.
        taken: the number of patches taken.
        names: the names of the parameters in the last patch.
    """

    def __init__(self) -> None:
        self.chain, self.taken = "", 0
        self.names: frozenset[str] = frozenset()
        self._loaded = False
        self._tracked: dict[torch.Tensor, Tracked] = {}

    def of(self, param: torch.Tensor, view: ParamView) -> Tracked:
        """The record of a parameter, compared with its version counter; made at the first call.

        Raises:
            ValueError: the placements of a DTensor are not supported.
        """
        tracked = self._tracked.get(param)
        if tracked is None:
            # The record of a parameter that appears after the first patch starts whole: receivers
            # have no checksum of it.
            tracked = Tracked(view, self._loaded or bool(self.chain))
            self._tracked[param] = tracked
        tracked.look(view)
        return tracked

    def bits(self, param: torch.Tensor, view: ParamView) -> torch.Tensor:
        """The bits of a parameter for the steps of a new plan; see :meth:`of`."""
        return self.of(param, view).bits_for(view.local)

    def begin(self, params: Iterable[torch.Tensor]) -> Tally:
        """The tally of a new plan with these parameters, which :meth:`of` has seen."""
        tally = Tally()
        for param in params:
            self._tracked[param].begin(tally)
        return tally

    def next_patch(self, names: Iterable[str]) -> tuple[str, str]:
        """Counts a patch with these parameters; returns the ids of its predecessor and its own."""
        last = f"{self.chain}.{self.taken}" if self.taken else ""
        self.taken += 1
        self.names = frozenset(names)
        return last, f"{self.chain}.{self.taken}"

    def mark_loaded(self) -> None:
        """Marks every parameter as changed throughout, after states were loaded or copied."""
        self._loaded = True
        for tracked in self._tracked.values():
            tracked.whole = True

    def keep(self, params: Iterable[Any]) -> None:
        """Drops the records of all other parameters, so that their memory can be freed."""
        self._tracked = {p: self._tracked[p] for p in params if p in self._tracked}
