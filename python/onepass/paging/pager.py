"""What an optimizer with paged states has: which states rest where, host memory, rings."""

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
    """Bytes that paged states take for one device, beside parameters, gradients and tables.

    Attributes:
        resident: of states that stay on the device, at most the budget.
        ring: of the buffers there through which the others stream.
        host: of the states on the host.
    """

    resident: int = 0
    ring: int = 0
    host: int = 0


@dataclass
class Places:
    """Which parameters' states are paged, and what that takes of each device."""

    paged: set[torch.Tensor] = field(default_factory=set)
    footprints: dict[torch.device, Footprint] = field(default_factory=dict)


def places_of(groups: Groups, rule: Rule, paging: Paging) -> Places:
    """Decides by sizes alone: of each device the largest first, as long as they fit its budget; of
    DTensors by those of this rank's shards.

    Large ones first leaves little of a budget unused. A parameter's states stay together.
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
        home: of states that are paged: see :class:`onepass.engine.state_layouts.Home`.
        failed: why it cannot go on: a step ended on its way. Empty while it can.
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
        """See :func:`places_of`; unless anew, only if an option that sizes depend on is another."""
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
        """Reserves host memory for the paged states of parameters that have none yet.

        Args:
            params: with their groups.
            state: ``optimizer.state``; only read, without waiting for states on their way.
            later: all parameters that will have a plan of their own; where memory must be
                allocated, it is one slab for the states of all of them. None where there are no
                other plans.

        Raises:
            MemoryError: the host lacks that memory.
        """
        needed = self._missing(params, state)
        if later is not None and needed > self.slabs.room:
            needed = self._missing(later(), state)
        self.slabs.want(needed)

    def announce(self, groups: Groups) -> set[torch.Tensor]:
        """Parameters whose states are to be paged, all of them new, with the options of groups.

        Raises:
            MemoryError: the host has not so much memory.
        """
        if not self.failed:
            self.settle()  # what is loaded may be states of this very optimizer
        places = self.places(groups)
        self.slabs.want(sum(found.host for found in places.footprints.values()))
        return places.paged

    def _missing(self, params: Iterable[Owned], state: dict[Any, Any]) -> int:
        needed = 0
        for param, group in params:
            if param in self._places.paged:
                entry = dict.get(state, param, {})
                for layout in held_layouts(local_of(param), self.rule, group):
                    if self.slabs.find(local_of(entry.get(layout.key))) is None:
                        needed += aligned(layout.nbytes)
        return needed

    def link(self, device: torch.device) -> Link:
        """The link of a device."""
        if device not in self._links:
            self._links[device] = link_for(device)
            if device.type not in ("cpu", "cuda"):
                warnings.warn(
                    f"paged states: there are no asynchronous copies for {device} here, so a step "
                    "waits for each of them",
                    stacklevel=2,
                )
        return self._links[device]

    @property
    def rings(self) -> list[Ring]:
        """Those that there are, of every device."""
        return list(self._rings.values())

    def ring(self, device: torch.device) -> Ring:
        """The ring of a device."""
        buffers = self.paging.buffers
        nbytes = self._places.footprints[device].ring // buffers
        if device not in self._rings or self._rings[device].nbytes != nbytes:
            self._rings.pop(device, None)
            self._rings[device] = Ring(self.link(device), device, buffers, nbytes)
        return self._rings[device]

    def _pin(self, address: int, nbytes: int) -> Any:
        # Pinned once, for whichever devices: they share the memory.
        devices = [d for d in self._places.footprints if d.type == "cuda"] or [torch.device("cpu")]
        return self.link(devices[0]).pin(address, nbytes)

    @contextmanager
    def going(self) -> Iterator[None]:
        """What fails within it leaves a step half done, and the optimizer refuses to go on."""
        try:
            yield
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise

    def settle(self) -> None:
        """Waits until all states are on the host, or where they stay.

        Raises:
            RuntimeError: a step was left half taken.
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
        """Raises RuntimeError when a step was left half taken."""
        if self.failed:
            raise RuntimeError(
                "a paged step failed after it had changed some tensors, so weights and states are "
                "not of one step: load a checkpoint of both, or make the optimizer anew "
                f"({self.failed})"
            )

    def forget(self) -> None:
        """All states are about to be others: of a checkpoint."""
        self._rings = {}
        self._key = None
        self.failed = ""


class Slabbed:
    """In slabs on the host: see :class:`onepass.engine.state_layouts.Home`."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        cpu = torch.device("cpu")
        return layout.fits(tensor, cpu) and self._slabs.find(tensor) is not None

    def empty(self, layout: Layout) -> torch.Tensor:
        return self._slabs.take(layout)
