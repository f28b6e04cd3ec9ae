"""The plan: an optimizer's parameter list flattened once, and the checks that keep it true.

A step costs reading the gradients and comparing what is there with what the plan was made for:
identities in Python, pointers and layouts in the backend. Whatever changed (a parameter without a
gradient, a replaced state, a moved tensor, another option of a group), the plan is made anew.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import backends
from .arena import Arena
from .checks import check_tensors, check_weight_format
from .distributed.part import PagedShards, ShardedPart
from .distributed.ranks import Groups, Ranks
from .distributed.shards import local_of, shards_of, versioned
from .formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, scale_key
from .groups import Reader, is_fixed, options_of, same, values_of
from .held import OptimizerState, PagedState, ParamState, Watch
from .paging.part import PagedPart
from .parts import Part
from .reader import same_lists
from .reference.verdict import VERDICT_WIDTH
from .rows import TELEMETRY_WIDTH, RowTable, capturing
from .states import (
    EMA,
    fill,
    fit_companion,
    fit_ema,
    fit_states,
    packed_order,
    stale_keys,
    state_layouts,
)

if TYPE_CHECKING:
    from .optim.base import Optimizer


class Member(NamedTuple):
    """A parameter of an optimizer.

    Attributes:
        param: the tensor.
        number: keys its random bits: its position in the optimizer, unless it was given one.
        at, group: its group, and the position of that.
    """

    param: torch.Tensor
    number: int
    at: int
    group: dict[str, Any]


class _Place(NamedTuple):
    """Where entries are that are worked on together: on a device, and if they are shards of
    DTensors, cut over the same process groups."""

    device: torch.device
    groups: Groups | None


def add_norms(parts: torch.Tensor) -> torch.Tensor:
    """What :meth:`Backend.norm` found of several lists, float64 [lists, 3], as of one."""
    total = parts.sum(0)
    total[1] = parts[:, 1].max()
    return total


class Plan:
    """Flattens an optimizer's groups.

    Everything is checked before any state is made, so that an error leaves the optimizer, its
    states and its parameters as they were.

    Raises:
        ValueError: a group option, parameter or gradient that no rule can work on; names it.
        RuntimeError: a sparse gradient, no backend for a device, or a CUDA graph is being captured.
    """

    def __init__(self, optimizer: Optimizer, members: list[Member]) -> None:
        rule = optimizer.rule
        self._optimizer = optimizer
        self.members = members
        self._active = [member.param for member in members]
        if capturing() and any(p.is_cuda for p in self._active):
            raise RuntimeError(
                "a step that is captured needs one before it with the same parameters, states and "
                "gradients: making its plan waits for the device"
            )
        # A plan of one parameter, of gradients that are released, does not look at the others.
        self._whole = optimizer.released is None or len(members) != 1
        active = set(self._active)
        groups = optimizer.param_groups if self._whole else [members[0].group]
        self._groups = groups
        self._params = [list(group["params"]) for group in groups] if self._whole else []
        self._idle = [p for params in self._params for p in params if p not in active]
        self._options = [self._group_options(group) for group in groups]
        self._checked: list[Any] | None = None

        shards = shards_of(chain.from_iterable(group["params"] for group in groups))
        self._versioned = [versioned(p) if p in shards else p for p in self._active]
        self._ranks = None
        if self._whole and (shards or optimizer.norm_group is not None):
            every = chain.from_iterable(group["params"] for group in groups)
            self._ranks = Ranks(every, shards, optimizer.norm_group)

        arena, pager = Arena(), optimizer.pager
        paged: set[torch.Tensor] = set()
        if pager is not None:
            pager.settle()  # states are read, and may come to another place in the ring
            paged = pager.places(optimizer.param_groups, self._whole).paged
        for group in groups:
            optimizer.check_options(group)
        for whole, number, _, group in members:
            which = f"parameter {number} of shape {tuple(whole.shape)}"
            assert whole.grad is not None
            check_tensors(whole, whole.grad, which)
            param = shards[whole].check(which) if whole in shards else whole
            check_weight_format(param, group["weights"], which)
            state, form = optimizer.state.get(whole, {}), STATE_FORMATS[group["states"]]
            for _, name in rule.state_slots(rule.flag_bits(group)):
                if state.get(name) is None and whole not in paged:
                    for layout in state_layouts(param, name, form):
                        arena.want(layout, param.device)
        extras = optimizer.measures or any(group["ema_decay"] is not None for group in groups)
        chosen = {
            device: backends.choose(device, optimizer.backend, extras)
            for device in dict.fromkeys(
                shards[p].local.device if p in shards else p.device for p in self._active
            )
        }

        if pager is not None:
            pager.want(members, optimizer)

        # New states are gathered first: nothing is kept of them if memory runs out on the way.
        fresh: list[tuple[torch.Tensor, StateFormat, dict[str, Any], _Place, int]] = []
        numbers: dict[_Place, dict[tuple[int, float, bool], int]] = {}
        entries: dict[_Place, list[backends.Entry]] = {}
        wholes: dict[_Place, list[torch.Tensor]] = {}
        read = Reader()
        for whole, number, index, group in members:
            shard = shards.get(whole)
            param = whole if shard is None else shard.local
            place = _Place(param.device, None if shard is None else shard.groups)
            flags = rule.flag_bits(group)
            form, weight = STATE_FORMATS[group["states"]], WEIGHT_FORMATS[group["weights"]]
            slots = rule.state_slots(flags)
            state = saved = optimizer.state.get(whole, {})
            which = f"parameter {number} of shape {tuple(whole.shape)}"
            saved_as = getattr(state, "form", "")
            if shard is not None:
                saved = shard.inner(state, rule)
            home = None if pager is None or whole not in paged else pager.home
            held = fit_states(saved, param, rule, form, which, saved_as=saved_as, home=home)
            first = rule.needs_first and read(getattr(state, "fresh", None)) != 0.0
            for _, name in slots:
                if name in held:
                    continue
                first = rule.needs_first
                for layout in state_layouts(param, name, form):
                    new = arena.take(layout, param.device) if home is None else home.empty(layout)
                    held[layout.key] = new
                start = rule.initial_value(name, group)
                if start:
                    fill(held, name, form, start)
            companion = fit_companion(saved, param, weight, which, home=home)
            if companion is not None:
                held[weight.key] = companion
            if group["ema_decay"] is not None:
                held[EMA] = fit_ema(saved, param, which, home=home)
            rows = numbers.setdefault(place, {})
            row = rows.setdefault((index, read(state.get("step")), first), len(rows))
            order = packed_order(param, form) if slots else {}
            kept = {**held, **order}
            if shard is not None:
                kept = shard.wrapped(kept, rule, form)
            fresh.append((whole, form, kept, place, row))
            wholes.setdefault(place, []).append(whole)
            entries.setdefault(place, []).append(
                backends.Entry(
                    param=param,
                    states={slot: held[name] for slot, name in slots},
                    scales={
                        slot: held[scale_key(name)]
                        for slot, name in slots
                        if form.scale is not None
                    },
                    format=form,
                    weight=weight.codes[param.dtype],
                    draws=form.stochastic or weight.stochastic,
                    companion=companion,
                    ema=held.get(EMA),
                    rule=rule,
                    flags=flags,
                    row=row,
                    param_id=number,
                    first=0 if shard is None else shard.start(form),
                )
            )
        all_groups = optimizer.param_groups
        tables = {
            place: RowTable(
                rule,
                [(all_groups[index], count, first) for index, count, first in rows],
                place.device,
                optimizer.measures,
            )
            for place, rows in numbers.items()
        }
        self._parts = [
            self._part(chosen[place.device], listed, tables[place], wholes[place], place, paged)
            for place, listed in entries.items()
        ]
        self._kinds = [place.groups or () for place in entries]

        self._watch = Watch()
        for param, form, held, place, index in fresh:
            shared = tables[place].rows[index]
            param_state = optimizer.state[param]
            if not isinstance(param_state, ParamState):
                param_state = optimizer.state[param] = ParamState(param_state)
            # Scales and companions of a format that the group no longer has.
            for stale in stale_keys(param_state, held, rule):
                del param_state[stale]
            param_state.update(held, step=shared.step)
            param_state.form, param_state.fresh = form.name, shared.fresh
            param_state.watch = self._watch
        if self._whole:
            if pager is not None and not isinstance(optimizer.state, PagedState):
                optimizer.state = PagedState(pager.settle, optimizer.state)
            elif not isinstance(optimizer.state, OptimizerState):
                optimizer.state = OptimizerState(optimizer.state)
            optimizer.state.watch = self._watch
        self._state = optimizer.state
        self._own = optimizer.state[self._active[0]] if len(members) == 1 else None

    def _part(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        wholes: list[torch.Tensor],
        place: _Place,
        paged: set[torch.Tensor],
    ) -> Part:
        pager, moved = self._optimizer.pager, self._optimizer.moved
        away = {local_of(whole) for whole in wholes if whole in paged}
        if pager is None or not away:
            if place.groups is None:
                return Part(backend, entries, table)
            return ShardedPart(backend, entries, table, wholes=wholes, moved=moved)
        if place.groups is None:
            return PagedPart(backend, entries, table, pager=pager, paged=away)
        return PagedShards(
            backend, entries, table, wholes=wholes, moved=moved, pager=pager, paged=away
        )

    def _group_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What entries were made from; the other options are read at every step."""
        return (
            self._optimizer.rule.flag_bits(group),
            group["states"],
            group["weights"],
            group["ema_decay"] is None,
            len(group["params"]),
        )

    def check_options(self) -> None:
        """Raises ValueError for an option that is out of range; each value is looked at once."""
        if self._checked is None:
            groups = self._optimizer.param_groups
            for group in groups:
                self._optimizer.check_options(group)
            if self._whole and all(map(is_fixed, options_of(groups))):
                self._checked = list(values_of(groups))

    def _unchanged(self) -> bool:
        """Whether the groups hold the very objects that were checked, all of them immutable."""
        known = self._checked
        groups = self._optimizer.param_groups
        return (
            known is not None
            and sum(map(len, groups)) == len(known)
            and same(values_of(groups), known)
        )

    def _holds(self) -> bool:
        """Whether groups, states and the parameters without a gradient are what they were."""
        optimizer = self._optimizer
        if not self._unchanged():
            self._checked = None
            if [self._group_options(group) for group in self._groups] != self._options:
                return False
        state = optimizer.state
        if state is not self._state or not self._watch.same:
            return False
        if not self._whole:
            return dict.get(state, self._active[0]) is self._own
        groups = optimizer.param_groups
        if len(groups) != len(self._params) or not all(
            same_lists(g["params"], known) for g, known in zip(groups, self._params, strict=True)
        ):
            return False
        return all(p.grad is None for p in self._idle)

    def refresh(self) -> bool:
        """Takes the gradients; False, with nothing changed, when the plan is no longer true."""
        holds = self._holds() and all(part.refresh() for part in self._parts)
        if holds and capturing():
            self._optimizer.captured.append(self)
        return holds

    def norm(self) -> torch.Tensor | None:
        """See :meth:`Backend.norm`, over all devices and ranks and on the first device; None
        without gradients."""
        found = [part.norm() for part in self._parts]
        if self._ranks is not None:
            largest = self._optimizer.policy().largest
            return self._ranks.norm(list(zip(self._kinds, found, strict=True)), largest)
        if len(found) < 2:
            return found[0] if found else None
        return add_norms(torch.stack([f.to(found[0].device, non_blocking=True) for f in found]))

    def judge(
        self,
        verdict: torch.Tensor | None,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: backends.Policy,
    ) -> torch.Tensor | None:
        """See :meth:`Backend.judge`; verdict, made where it is None, is of the first device."""
        if not self._parts:
            return verdict
        device = self._parts[0].table.steps.device
        if capturing():
            if verdict is None:
                raise RuntimeError("a step that is captured needs one before it that judges as it")
            self._optimizer.captured.append(verdict)
        if verdict is None:
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64, device=device)
        verdict = verdict.to(device)
        scale, inf = (
            None if t is None else t.to(device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        self._parts[0].backend.judge(verdict, found, scale, inf, policy)
        return verdict

    def start(self) -> int:
        """Starts to bring paged states to their devices; nothing is changed. Returns how many pages
        there are of them."""
        return sum(part.start() for part in self._parts)

    def run(self, verdict: torch.Tensor | None, zero_grads: bool) -> None:
        """The step, with the gradients that refresh has taken."""
        for part in self._parts:
            here = verdict
            if verdict is not None:
                here = verdict.to(part.table.steps.device, non_blocking=True)
            part.run(here, zero_grads)
        # Kernels write behind autograd's back: it must still see that saved weights changed.
        torch.autograd.graph.increment_version(self._versioned)

    def telemetry(self) -> list[torch.Tensor]:
        """Of each group, its columns summed over rows and ranks, on the first device: see RowTable.

        Where parameters are sharded all ranks must ask."""
        groups = self._optimizer.param_groups
        device = self._parts[0].table.steps.device if self._parts else torch.device("cpu")
        shape = len(groups), TELEMETRY_WIDTH
        parts = []
        for kind, part in zip(self._kinds, self._parts, strict=True):
            sums, found = (
                torch.zeros(shape, dtype=torch.float64, device=device),
                part.table.telemetry,
            )
            for i, row in enumerate(part.table.rows):
                number = next(n for n, group in enumerate(groups) if group is row.group)
                if found is not None:
                    sums[number] += found[i].to(device)
            parts.append((kind, sums))
        if self._ranks is not None:
            return list(self._ranks.sums(parts, shape).unbind())
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        return list(sum((sums for _, sums in parts), total).unbind())
