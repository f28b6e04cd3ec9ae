"""Building a plan: every parameter, gradient and state is checked, then flattened into entries.

Nothing of the optimizer is changed, so that an error on the way leaves it as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..distributed.device_plan import PagedShards, ShardedPart
from ..distributed.rank_sums import Groups, Ranks
from ..distributed.shards import shards_of
from ..formats import STATE_FORMATS, WEIGHT_FORMATS, scale_key
from ..paging.device_plan import PagedPart
from ..rules.group_options import option
from . import backends
from .comparisons import Reader
from .device_plan import Part
from .hyper_table import History, RowTable, capturing, step_number
from .plan import Made, Member, Plan
from .state_allocator import Arena
from .state_conversion import fill, fit_companion, fit_ema, fit_states, packed_order
from .state_layouts import EMA, state_layouts
from .state_tracking import Watch
from .tensor_access import unwrapped, version_holder
from .validation import check_distinct, check_tensors, check_weight_format

if TYPE_CHECKING:
    from ..optim.stepping import Stepping


class _Place(NamedTuple):
    """Where entries are that are worked on together: on a device, and if they are shards of
    DTensors, cut over the same process groups."""

    device: torch.device
    groups: Groups | None


class _Listed:
    """The entries of one place, and the rows of their hyperparameter table."""

    def __init__(self) -> None:
        self.owners: list[torch.Tensor] = []
        self.entries: list[backends.Entry] = []
        # (group, history) -> row, and each row's first parameter
        self.rows: dict[tuple[int, History], int] = {}
        self.names: list[str] = []

    def row(self, group: int, history: History, which: str) -> int:
        """The row of a parameter with this history."""
        row = self.rows.setdefault((group, history), len(self.rows))
        if row == len(self.names):
            self.names.append(which)
        return row


def make_plan(optimizer: Stepping, members: list[Member]) -> Plan:
    """The plan of a step.

    Args:
        optimizer: only read.
        members: parameters with gradients.

    Raises:
        ValueError: a group option, parameter, gradient or state that no rule can work on; names it.
        RuntimeError: a sparse gradient, no backend for a device, or a CUDA graph is being captured.
    """
    return _Planner(optimizer, members).plan()


class _Planner:
    def __init__(self, optimizer: Stepping, members: list[Member]) -> None:
        self.optimizer, self.members, self.rule = optimizer, members, optimizer.rule
        self.whole = optimizer.released is None or len(members) != 1
        self.groups = optimizer.param_groups if self.whole else [members[0].group]
        every = list(chain.from_iterable(group["params"] for group in self.groups))
        self.shards = shards_of(every)
        self.ranks: Ranks | None = None
        if self.whole and (self.shards or optimizer.norm_group is not None):
            self.ranks = Ranks(every, self.shards, optimizer.norm_group)
        self.arena, self.read = Arena(), Reader()
        self.paged: set[torch.Tensor] = set()
        self.listed: dict[_Place, _Listed] = {}
        # Of each member its place, row and states.
        self.held: list[tuple[_Place, int, dict[str, Any]]] = []

    def plan(self) -> Plan:
        if capturing() and any(member.param.is_cuda for member in self.members):
            raise RuntimeError(
                "a step that is captured needs one before it with the same parameters, states and "
                "gradients: making its plan waits for the device"
            )
        optimizer, pager = self.optimizer, self.optimizer.pager
        if pager is not None:
            pager.settle()  # states are read, and may come to another place in the ring
            self.paged = pager.places(optimizer.param_groups, self.whole).paged
        for group in self.groups:
            optimizer.check_options(group)
        for member in self.members:
            self.check(member)
        chosen = self.chosen()
        if pager is not None:
            pager.want(self.members, optimizer)
        for member in self.members:
            self.add(member)
        for listed in self.listed.values():
            check_distinct(
                (tensor, f"parameter {entry.param_id}")
                for entry in listed.entries
                for tensor in (entry.param, *entry.held())
            )
        groups = optimizer.param_groups
        tables = {
            place: RowTable(
                self.rule,
                [(groups[index], history) for index, history in listed.rows],
                place.device,
                optimizer.measures,
                listed.names,
            )
            for place, listed in self.listed.items()
        }
        made = [
            Made(member.param, held, tables[place].rows[row])
            for member, (place, row, held) in zip(self.members, self.held, strict=True)
        ]
        params = (member.param for member in self.members)
        return Plan(
            self.rule,
            self.groups,
            self.members,
            self.whole,
            parts=[
                self.part(chosen[place.device], place, listed, tables[place])
                for place, listed in self.listed.items()
            ],
            kinds=[place.groups or () for place in self.listed],
            ranks=self.ranks,
            made=made,
            versioned=[
                version_holder(p) if p in self.shards else p for p in params if not p.is_inference()
            ],
            watch=Watch(
                _forgetting(weakref.ref(optimizer), None if self.whole else self.members[0].param)
            ),
        )

    def check(self, member: Member) -> None:
        """Raises unless the rule can work on a parameter and its gradient; announces its states."""
        whole, group, which = member.param, member.group, _name(member)
        if whole in self.shards:
            param, grad = self.shards[whole].check(which)
        else:
            assert whole.grad is not None
            param, grad = whole, unwrapped(whole.grad, which)
        check_tensors(param, grad, which)
        check_weight_format(param, option(group, "weights"), which)
        state, form = self.optimizer.state.get(whole, {}), STATE_FORMATS[option(group, "states")]
        for _, name in self.rule.state_slots(self.rule.flag_bits(group)):
            if state.get(name) is None and whole not in self.paged:
                for layout in state_layouts(param, name, form):
                    self.arena.want(layout, param.device)

    def chosen(self) -> dict[torch.device, backends.Backend]:
        """The backend of each device."""
        optimizer, shards = self.optimizer, self.shards
        extras = optimizer.measures or any(
            option(group, "ema_decay") is not None for group in self.groups
        )
        params = [member.param for member in self.members]
        devices = [shards[p].local.device if p in shards else p.device for p in params]
        return {
            device: backends.choose(device, optimizer.backend, extras)
            for device in dict.fromkeys(devices)
        }

    def add(self, member: Member) -> None:
        """Adds the entry of a parameter with its states, fitted ones or new ones."""
        rule, (whole, number, index, group) = self.rule, member
        shard = self.shards.get(whole)
        param = whole if shard is None else shard.local
        place = _Place(param.device, None if shard is None else shard.groups)
        flags, which = rule.flag_bits(group), _name(member)
        form, weight = (
            STATE_FORMATS[option(group, "states")],
            WEIGHT_FORMATS[option(group, "weights")],
        )
        slots = rule.state_slots(flags)
        state = self.optimizer.state.get(whole, {})
        saved = state if shard is None else shard.inner(state, rule)
        held, first = self.states(member, param, state, saved)
        count = self.read(state.get("step"), which)
        if rule.needs_first and state.get("step") is None:
            # State dicts may leave the count out: a buffer says that a step was taken.
            count = float(any(state.get(key) is not None for key in rule.keys))
        step_number(count, which)  # checks it
        listed = self.listed.setdefault(place, _Listed())
        scalar_states = tuple(
            self.read(state.get(scalar.key), which, scalar.key, scalar.starts_at)
            for scalar in rule.scalar_states
        )
        row = listed.row(index, History(count, first, scalar_states), which)
        # The states of an option that is off stay in the entry, and their order with them.
        coded = any(key in held for key in rule.keys)
        kept = {**held, **(packed_order(param, form) if coded else {})}
        if shard is not None:
            kept = shard.wrapped(kept, rule, form)
        self.held.append((place, row, kept))
        listed.owners.append(whole)
        scaled = [(slot, name) for slot, name in slots if form.scale is not None]
        listed.entries.append(
            backends.Entry(
                param=param,
                states={slot: held[name] for slot, name in slots},
                scales={slot: held[scale_key(name)] for slot, name in scaled},
                format=form,
                weight=weight.codes[param.dtype],
                draws=form.stochastic or weight.stochastic,
                companion=held.get(weight.key),
                ema=held.get(EMA),
                rule=rule,
                flags=flags,
                row=row,
                param_id=number,
                first=0 if shard is None else shard.start(form),
            )
        )

    def states(
        self, member: Member, param: torch.Tensor, state: Any, saved: Any
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """The tensors that the step reads and writes of a parameter, by key, and whether no step
        has been taken with them, where the rule asks for that.

        Args:
            member: see :class:`Member`.
            param: its tensor, or its shard's.
            state: its entry of the optimizer's state; saved: the same, of the shard.
        """
        rule, group, which = self.rule, member.group, _name(member)
        form, weight = (
            STATE_FORMATS[option(group, "states")],
            WEIGHT_FORMATS[option(group, "weights")],
        )
        pager = self.optimizer.pager
        home = None if pager is None or member.param not in self.paged else pager.home
        held = fit_states(saved, param, rule, form, which, home=home)
        first = rule.needs_first and self.is_fresh(state, which)
        for _, name in rule.state_slots(rule.flag_bits(group)):
            if name in held:
                continue
            first = rule.needs_first
            for layout in state_layouts(param, name, form):
                new = self.arena.take(layout, param.device) if home is None else home.empty(layout)
                held[layout.key] = new
            start = rule.initial_value(name, group)
            if start:
                fill(held, name, form, start)
        companion = fit_companion(saved, param, weight, which, home=home)
        if companion is not None:
            held[weight.key] = companion
        if option(group, "ema_decay") is not None:
            held[EMA] = fit_ema(saved, param, which, home=home)
        return held, first

    def is_fresh(self, state: Any, which: str) -> bool:
        """Whether no step has been taken with the states of an entry. Of an entry that was loaded,
        copied or replaced, a step counter of 0 says so."""
        fresh = getattr(state, "fresh", None)
        if fresh is not None:
            return self.read(fresh, which) != 0.0
        return "step" in state and self.read(state["step"], which) == 0.0

    def part(
        self, backend: backends.Backend, place: _Place, listed: _Listed, table: RowTable
    ) -> Part:
        pager, moved = self.optimizer.pager, self.optimizer.moved
        entries, owners = listed.entries, listed.owners
        away = [i for i, owner in enumerate(owners) if owner in self.paged]
        if pager is None or not away:
            if place.groups is None:
                return Part(backend, entries, table, owners)
            return ShardedPart(backend, entries, table, owners, moved=moved)
        if place.groups is None:
            return PagedPart(backend, entries, table, owners, pager=pager, paged=away)
        return PagedShards(backend, entries, table, owners, moved=moved, pager=pager, paged=away)


def _name(member: Member) -> str:
    return f"parameter {member.number} of shape {tuple(member.param.shape)}"


def _forgetting(
    reference: weakref.ref[Stepping], param: torch.Tensor | None
) -> Callable[[Watch], None]:
    """What a watch calls: the optimizer drops the plan of this watch, which is of one parameter, or
    of all for None."""

    def forget(watch: Watch) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.forget_plan(watch, param)

    return forget
