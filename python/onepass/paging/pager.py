"""The pager of an optimizer: the placement of states, host memory and rings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.state_allocator import allocated
from ..engine.state_layouts import Layout, held_layouts
from ..engine.tensor_access import local_of
from ..rules import Rule
from ..rules.group_options import option
from .links import Link, link_for
from .options import Paging
from .ring import Ring
from .slabs import Slabs, aligned

Groups = Sequence[Mapping[str, Any]]

Owned = tuple[torch.Tensor, Mapping[str, Any]]
"""A parameter and its group."""


@dataclass
class Footprint:
    """Bytes of memory for the states of one device, without parameters, gradients and tables.

    Attributes:
        resident: bytes of states that stay on the device, at most the budget.
        ring: bytes of the device buffers through which paged states are streamed.
        host: bytes of states in host memory.
    """

    resident: int = 0
    ring: int = 0
    host: int = 0


@dataclass
class Places:
    """The placement of states.

    Attributes:
        paged: parameters whose states are paged.
        footprints: memory by device.
    """

    paged: set[torch.Tensor] = field(default_factory=set)
    footprints: dict[torch.device, Footprint] = field(default_factory=dict)


def places_of(groups: Groups, rule: Rule, paging: Paging) -> Places:
    """Decides which states are paged.

    The largest states of each device stay there while they fit the budget; this order leaves little
    of the budget unused. All states of a parameter have the same placement. The size of a DTensor
    is the size of this rank's shard.

    Args:
        groups: ``optimizer.param_groups``.
        rule: the rule of the optimizer.
        paging: the budget and the page size.
    """
    sizes = []
    for group in groups:
        for param in group["params"]:
            local = local_of(param)
            nbytes = [layout.nbytes for layout in held_layouts(local, rule, group)]
            here = sum(allocated(n, local.device) for n in nbytes)
            sizes.append((here, sum(map(aligned, nbytes)), param, local.device))
    places = Places()
    for here, away, param, device in sorted(sizes, key=lambda size: -size[0]):
        found = places.footprints.setdefault(device, Footprint())
        if found.resident + here <= paging.budget:
            found.resident += here
        elif away:
            found.host += away
            places.paged.add(param)
    for found in places.footprints.values():
        found.ring = paging.buffers * min(found.host, aligned(paging.page_bytes))
    return places


class Pager:
    """Host memory and rings of one optimizer.

    Attributes:
        paging: the budget and the page size.
        rule: the rule of the optimizer.
        slabs: host memory of paged states.
        home: the storage location of paged states.
        failed: the reason why an earlier step failed halfway; empty if none did.
    """

    def __init__(self, paging: Paging, rule: Rule) -> None:
        self.paging, self.rule = paging, rule
        self.failed = ""
        self._links: dict[torch.device, Link] = {}
        self._rings: dict[torch.device, Ring] = {}
        self.slabs = Slabs(self._pin)
        self.home = Slabbed(self.slabs)
        self._key: Any = None
        self._places = Places()

    def places(self, groups: Groups, anew: bool = True) -> Places:
        """The placement of states; see :func:`places_of`.

        Args:
            groups: ``optimizer.param_groups``.
            anew: whether to recompute the placement even if no option that affects sizes changed.
        """
        flags = self.rule.flag_bits
        key = [
            (
                flags(g),
                option(g, "states"),
                option(g, "weights"),
                option(g, "ema_decay") is None,
                len(g["params"]),
            )
            for g in groups
        ]
        if anew or key != self._key:
            self._places, self._key = places_of(groups, self.rule, self.paging), key
        return self._places

    def want(
        self,
        params: Iterable[Owned],
        state: dict[Any, Any],
        later: Callable[[], Iterable[Owned]] | None = None,
    ) -> None:
        """Reserves host memory for paged states that do not exist yet.

        Args:
            params: parameters with their groups.
            state: ``optimizer.state``; it is only read, without waiting for copies.
            later: returns all parameters that will have their own plans. If memory must be
                allocated, one slab is allocated for all of their states. None for a single plan.

        Raises:
            MemoryError: the host has too little free memory.
        """
        needed = self._missing(params, state)
        if later is not None and needed > self.slabs.room:
            needed = self._missing(later(), state)
        self.slabs.want(needed)

    def announce(self, groups: Groups) -> set[torch.Tensor]:
        """Reserves host memory for a full set of new states, as a state dict is loaded.

        Args:
            groups: the parameter groups with the loaded options.

        Returns:
            The parameters whose states are paged.

        Raises:
            MemoryError: the host has too little free memory.
        """
        if not self.failed:
            self.settle()  # the loaded state dict may share tensors with this optimizer's states
        places = self.places(groups)
        self.slabs.want(sum(found.host for found in places.footprints.values()))
        return places.paged

    def _missing(self, params: Iterable[Owned], state: dict[Any, Any]) -> int:
        """Bytes of paged states of these parameters that are not in a slab."""
        needed = 0
        for param, group in params:
            if param in self._places.paged:
                entry = dict.get(state, param, {})
                for layout in held_layouts(local_of(param), self.rule, group):
                    if self.slabs.find(local_of(entry.get(layout.key))) is None:
                        needed += aligned(layout.nbytes)
        return needed

    def link(self, device: torch.device) -> Link:
        """The link of a device, created at first use."""
        if device not in self._links:
            self._links[device] = link_for(device)
            if device.type not in ("cpu", "cuda"):
                warnings.warn(
                    f"paged states: asynchronous copies are not available for {device}, so a step "
                    "waits for each copy",
                    stacklevel=2,
                )
        return self._links[device]

    @property
    def rings(self) -> list[Ring]:
        """The existing rings of all devices."""
        return list(self._rings.values())

    def ring(self, device: torch.device) -> Ring:
        """The ring of a device, created anew if its size changed."""
        buffers = self.paging.buffers
        nbytes = self._places.footprints[device].ring // buffers
        if device not in self._rings or self._rings[device].nbytes != nbytes:
            self._rings.pop(device, None)
            self._rings[device] = Ring(self.link(device), device, buffers, nbytes)
        return self._rings[device]

    def _pin(self, address: int, nbytes: int) -> Any:
        """Pins host memory; see :meth:`Link.pin`."""
        # Pin once for all devices: cudaHostRegisterPortable makes the memory pinned for each.
        devices = [d for d in self._places.footprints if d.type == "cuda"] or [torch.device("cpu")]
        return self.link(devices[0]).pin(address, nbytes)

    @contextmanager
    def going(self) -> Iterator[None]:
        """A context for a running step: an error in it makes the pager refuse further steps."""
        try:
            yield
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise

    def settle(self) -> None:
        """Waits until all paged states are back on the host.

        Raises:
            RuntimeError: an earlier step failed halfway.
        """
        self.check()
        with self.going():
            for ring in self._rings.values():
                ring.settle()

    def discard(self) -> None:
        """See :meth:`Ring.discard`."""
        for ring in self._rings.values():
            ring.discard()

    def check(self) -> None:
        """Raises RuntimeError if an earlier step failed halfway."""
        if self.failed:
            raise RuntimeError(
                "a paged step failed after it had changed some tensors, so weights and states are "
                "inconsistent: load a checkpoint of model and optimizer (load_state_dict), or "
                f"create a new optimizer. The error was: {self.failed}"
            )

    def forget(self) -> None:
        """Drops rings and placement before all states are replaced by those of a checkpoint."""
        self._rings = {}
        self._key = None
        self.failed = ""


class Slabbed:
    """The location of states in host slabs; see :class:`onepass.engine.state_layouts.Home`."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        """Whether a tensor has this layout and is stored in a slab."""
        cpu = torch.device("cpu")
        return layout.fits(tensor, cpu) and self._slabs.find(tensor) is not None

    def empty(self, layout: Layout) -> torch.Tensor:
        """A new zero-filled tensor of this layout in a slab."""
        return self._slabs.take(layout)
