"""Sharding and paging of one plan: which tensors are updated and where states are stored."""

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
from ..engine.joint_table import JointTable
from ..engine.plan_request import Member, ParamView, PlainParam, RankSums
from ..engine.state_layouts import Home
from ..muon.batches import Settings
from ..muon.device_plan import MuonDevicePlan, Stage, SweepTable
from ..paging.device_plan import PagedDevicePlan
from ..paging.pager import Pager


class PagedShardedDevicePlan(ShardedDevicePlan, PagedDevicePlan):
    """A device plan for local tensors of DTensors with paged states."""


class ShardedMuonDevicePlan(MuonDevicePlan, ShardedDevicePlan):
    """A device plan of Muon for local tensors of DTensors."""


class PagedStage(Stage, PagedDevicePlan):
    """A sweep of Muon with paged states."""

    def sweep(self, switches: backends.StepSwitches) -> None:
        """See :meth:`Stage.sweep`; after an error the pager refuses further steps."""
        with self._pager.going():
            super().sweep(switches)


class Features:
    """The :class:`onepass.engine.plan_request.PlanFeatures` of an optimizer.

    Args:
        groups: the groups that the plan depends on.
        members: parameters with gradients.
        whole: whether the plan covers the whole optimizer.
        norm_group: see :class:`Options`.
        moved: see :data:`onepass.distributed.device_plan.Moved`.
        pager: the optimizer's pager; None if states are not paged.
        param_groups, state: of the optimizer; they are only read.
        muon: the options of Muon's products; None for other optimizers.
        later: returns all members that will have their own plans; None if there is a single plan.

    Raises:
        ValueError: a DTensor is a partial sum, or its local tensor is a subclass.
        RuntimeError: ``norm_group`` is given but torch.distributed is not initialised.
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
        muon: Settings | None,
        later: Callable[[], list[Member]] | None,
    ) -> None:
        every = list(chain.from_iterable(group["params"] for group in groups))
        self._shards = shards_of(every)
        self.ranks: RankSums | None = None
        if whole and (self._shards or norm_group is not None):
            self.ranks = Ranks(every, self._shards, norm_group)
        self._members, self._whole, self._moved = members, whole, moved
        self._pager, self._param_groups, self._state = pager, param_groups, state
        self._later, self._muon = later, muon
        self._paged: set[torch.Tensor] = set()

    def view(self, param: torch.Tensor) -> ParamView:
        """The part of a parameter that this rank updates."""
        return self._shards.get(param) or PlainParam(param)

    def place_states(self) -> None:
        """Decides which states are paged; see :meth:`Pager.places`."""
        if self._pager is not None:
            self._pager.settle()  # the new plan reads states and may assign other ring buffers
            self._paged = self._pager.places(self._param_groups, self._whole).paged

    def reserve_memory(self) -> None:
        """Reserves host memory for paged states; see :meth:`Pager.want`."""
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
        table: RowTable | JointTable,
        owners: list[torch.Tensor],
        sharded: bool,
    ) -> DevicePlan:
        """The part of a plan with these entries; sharded says whether the owners are DTensors."""
        if isinstance(table, JointTable):
            return self._make_muon(backend, entries, table, owners, sharded)
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

    def _make_muon(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: JointTable,
        owners: list[torch.Tensor],
        sharded: bool,
    ) -> DevicePlan:
        """The part of a plan of Muon; see :meth:`make_part`."""
        assert self._muon is not None
        away = [owner in self._paged for owner in owners]

        def make_stage(
            on: backends.Backend,
            listed: list[backends.Entry],
            values: SweepTable,
            numbers: list[int],
        ) -> Stage:
            paged = [
                i
                for i, (entry, n) in enumerate(zip(listed, numbers, strict=True))
                if away[n] and entry.held()
            ]
            if self._pager is None or not paged:
                return Stage(on, listed, values)
            return PagedStage(on, listed, values, pager=self._pager, paged=paged)

        group_of = {member.param: member.group for member in self._members}
        kind, options = MuonDevicePlan, {}
        if sharded:
            kind, options = ShardedMuonDevicePlan, {"moved": self._moved}
        return kind(
            backend,
            entries,
            table,
            owners,
            groups=[group_of[owner] for owner in owners],
            settings=self._muon,
            make_stage=make_stage,
            **options,
        )


def _owned(members: list[Member]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with its group."""
    return [(member.param, member.group) for member in members]
