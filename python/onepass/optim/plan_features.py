"""Sharding and paging in one plan: which tensors are stepped, where their states are stored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from ..distributed.device_plan import Moved, ShardedDevicePlan
from ..distributed.rank_sums import Ranks
from ..distributed.shards import shards_of
from ..engine import backends
from ..engine.device_plan import DevicePlan
from ..engine.hyper_table import RowTable
from ..engine.plan_request import Member, ParamView, PlainParam, RankSums
from ..engine.state_layouts import Home
from ..paging.device_plan import PagedDevicePlan
from ..paging.pager import Pager


class PagedShardedDevicePlan(ShardedDevicePlan, PagedDevicePlan):
    """Local tensors of DTensors, with states that are paged."""


class Features:
    """The :class:`onepass.engine.plan_request.PlanFeatures` of an optimizer.

    Args:
        groups: the groups that the plan depends on.
        members: parameters with gradients.
        whole: whether the plan is of the whole optimizer.
        norm_group: see :class:`Options`.
        moved: see :data:`onepass.distributed.device_plan.Moved`.
        pager: of the optimizer; None where states are not paged.
        param_groups, state: of the optimizer; only read.
        later: all members that will have a plan of their own; None where there is one plan.

    Raises:
        ValueError: a DTensor that is a partial sum, or whose local tensor is a subclass.
        RuntimeError: ``norm_group`` without initialised process groups.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        members: list[Member],
        whole: bool,
        *,
        norm_group: Any,
        moved: Moved,
        pager: Pager | None,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        later: Callable[[], list[Member]] | None,
    ) -> None:
        every = list(chain.from_iterable(group["params"] for group in groups))
        self._shards = shards_of(every)
        self.ranks: RankSums | None = None
        if whole and (self._shards or norm_group is not None):
            self.ranks = Ranks(every, self._shards, norm_group)
        self._members, self._whole, self._moved = members, whole, moved
        self._pager, self._param_groups, self._state = pager, param_groups, state
        self._later = later
        self._paged: set[torch.Tensor] = set()

    def view(self, param: torch.Tensor) -> ParamView:
        """A parameter as this rank steps it."""
        return self._shards.get(param) or PlainParam(param)

    def place_states(self) -> None:
        """Decides which states are paged; see :meth:`Pager.places`."""
        if self._pager is not None:
            self._pager.settle()  # states are read, and may come to another place in the ring
            self._paged = self._pager.places(self._param_groups, self._whole).paged

    def reserve_memory(self) -> None:
        """Reserves host memory for the states that are paged; see :meth:`Pager.want`."""
        if self._pager is None:
            return
        later = self._later
        self._pager.want(
            _owned(self._members), self._state, None if later is None else lambda: _owned(later())
        )

    def home(self, param: torch.Tensor) -> Home | None:
        """Where the states of a parameter are stored; None for the parameter's device."""
        return None if self._pager is None or param not in self._paged else self._pager.home

    def make_part(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        owners: list[torch.Tensor],
        sharded: bool,
    ) -> DevicePlan:
        """The part of a plan with these entries; sharded: the owners are DTensors."""
        pager, moved = self._pager, self._moved
        away = [i for i, owner in enumerate(owners) if owner in self._paged]
        if pager is None or not away:
            if not sharded:
                return DevicePlan(backend, entries, table, owners)
            return ShardedDevicePlan(backend, entries, table, owners, moved=moved)
        if not sharded:
            return PagedDevicePlan(backend, entries, table, owners, pager=pager, paged=away)
        return PagedShardedDevicePlan(
            backend, entries, table, owners, moved=moved, pager=pager, paged=away
        )


def _owned(members: list[Member]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    return [(member.param, member.group) for member in members]
