"""The plan: an optimizer's parameter list flattened once, and the checks that keep it true.

A step costs reading the gradients and comparing what is there with what the plan was built from:
identities in Python, addresses and layouts in the backend. If anything has changed (a parameter
without a gradient, a replaced state, a moved tensor, another option of a group), the plan is stale
and a new one is built.

Building a plan changes nothing: its new states become the optimizer's in :meth:`Plan.adopt`. A plan
refers neither to its optimizer nor to the dictionaries of the states, and its backends own no
parameter, so that torch can swap parameters and free what is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import backends
from .arena import Arena
from .checks import check_distinct, check_tensors, check_weight_format
from .distributed.part import PagedShards, ShardedPart
from .distributed.ranks import Groups, Ranks
from .distributed.shards import shards_of, versioned
from .formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, scale_key
from .gradients import share_memory, unwrapped, zero
from .groups import Reader, is_fixed, options_of, same, values_of
from .held import OptimizerState, PagedState, ParamState, Watch
from .paging.part import PagedPart
from .parts import Part
from .reference.verdict import VERDICT_WIDTH
from .rows import TELEMETRY_WIDTH, RowTable, capturing, step_number
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


class _Fresh(NamedTuple):
    """What a parameter's entry of ``optimizer.state`` becomes when the plan is adopted."""

    param: torch.Tensor
    form: StateFormat
    held: dict[str, Any]
    place: _Place
    row: int


class Plan:
    """Flattens an optimizer's groups.

    Args:
        optimizer: only read.
        members: parameters with gradients.

    Attributes:
        members: the same.
        adopted: whether its states are the optimizer's.
        changed: whether the last :meth:`run` may have changed anything.

    Raises:
        ValueError: a group option, parameter, gradient or state that no rule can work on; names it.
        RuntimeError: a sparse gradient, no backend for a device, or a CUDA graph is being captured.
    """

    def __init__(self, optimizer: Optimizer, members: list[Member]) -> None:
        rule = optimizer.rule
        self.members = members
        self.adopted = self.changed = False
        self._rule = rule
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
            if whole in shards:
                param, grad = shards[whole].check(which)
            else:
                assert whole.grad is not None
                param, grad = whole, unwrapped(whole.grad, which)
            check_tensors(param, grad, which)
            check_weight_format(param, group["weights"], which)
            state, form = optimizer.state.get(whole, {}), STATE_FORMATS[group["states"]]
            for _, name in rule.state_slots(rule.flag_bits(group)):
                if state.get(name) is None and whole not in paged:
                    for layout in state_layouts(param, name, form):
                        arena.want(layout, param.device)
        self._versioned = [
            versioned(p) if p in shards else p for p in self._active if not p.is_inference()
        ]
        extras = optimizer.measures or any(group["ema_decay"] is not None for group in groups)
        chosen = {
            device: backends.choose(device, optimizer.backend, extras)
            for device in dict.fromkeys(
                shards[p].local.device if p in shards else p.device for p in self._active
            )
        }

        if pager is not None:
            pager.want(members, optimizer)

        self._fresh: list[_Fresh] = []
        numbers: dict[_Place, dict[tuple[int, float, bool], int]] = {}
        firsts: dict[_Place, list[str]] = {}
        entries: dict[_Place, list[backends.Entry]] = {}
        owners: dict[_Place, list[torch.Tensor]] = {}
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
            first = rule.needs_first and read(getattr(state, "fresh", None), which) != 0.0
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
            count = read(state.get("step"), which)
            step_number(count, which)  # checks it
            rows = numbers.setdefault(place, {})
            row = rows.setdefault((index, count, first), len(rows))
            if row == len(firsts.setdefault(place, [])):
                firsts[place].append(which)
            order = packed_order(param, form) if slots else {}
            kept = {**held, **order}
            if shard is not None:
                kept = shard.wrapped(kept, rule, form)
            self._fresh.append(_Fresh(whole, form, kept, place, row))
            owners.setdefault(place, []).append(whole)
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
        for listed in entries.values():
            check_distinct(
                (t, f"parameter {e.param_id}") for e in listed for t in (e.param, *e.held())
            )
        all_groups = optimizer.param_groups
        self._tables = {
            place: RowTable(
                rule,
                [(all_groups[index], count, first) for index, count, first in rows],
                place.device,
                optimizer.measures,
                firsts[place],
            )
            for place, rows in numbers.items()
        }
        self._parts = [
            self._part(optimizer, chosen[place.device], listed, owners[place], place, paged)
            for place, listed in entries.items()
        ]
        self._kinds = [place.groups or () for place in entries]
        self.watch = Watch(
            _forgetting(weakref.ref(optimizer), None if self._whole else self._active[0])
        )

    def _part(
        self,
        optimizer: Optimizer,
        backend: backends.Backend,
        entries: list[backends.Entry],
        owners: list[torch.Tensor],
        place: _Place,
        paged: set[torch.Tensor],
    ) -> Part:
        table, pager = self._tables[place], optimizer.pager
        away = [i for i, owner in enumerate(owners) if owner in paged]
        if pager is None or not away:
            if place.groups is None:
                return Part(backend, entries, table, owners)
            return ShardedPart(backend, entries, table, owners, moved=optimizer.moved)
        if place.groups is None:
            return PagedPart(backend, entries, table, owners, pager=pager, paged=away)
        return PagedShards(
            backend, entries, table, owners, moved=optimizer.moved, pager=pager, paged=away
        )

    def adopt(self, optimizer: Optimizer) -> None:
        """Makes the plan's states and counters those of the optimizer.

        The optimizer then has them in ``optimizer.state``, and drops the plan when one of them is
        replaced or removed there.
        """
        if self.adopted:
            return
        for param, form, held, place, index in self._fresh:
            row = self._tables[place].rows[index]
            state = optimizer.state[param]
            if not isinstance(state, ParamState):
                state = optimizer.state[param] = ParamState(state)
            # Scales and companions of a format that the group no longer has.
            for stale in stale_keys(state, held, self._rule):
                del state[stale]
            state.update(held, step=row.step)
            state.form, state.fresh, state.watch = form.name, row.fresh, self.watch
            state.begun = ()
            if self._rule.needs_first:
                keys = [key for key, _, _ in self._rule.slots]
                state.begun = (*keys, *map(scale_key, keys))
        if self._whole:
            if optimizer.pager is not None and not isinstance(optimizer.state, PagedState):
                optimizer.state = PagedState(optimizer.pager.settle, optimizer.state)
            elif not isinstance(optimizer.state, OptimizerState):
                optimizer.state = OptimizerState(optimizer.state)
            optimizer.state.watch = self.watch
        self._fresh = []
        self.adopted = True

    def _group_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What entries were made from; the other options are read at every step."""
        return (
            self._rule.flag_bits(group),
            group["states"],
            group["weights"],
            group["ema_decay"] is None,
            len(group["params"]),
        )

    def check_options(self, optimizer: Optimizer) -> None:
        """Raises ValueError for an option that is out of range; each value is looked at once."""
        if self._checked is None:
            for group in self._groups:
                optimizer.check_options(group)
            if self._whole and all(map(is_fixed, options_of(self._groups))):
                self._checked = list(values_of(self._groups))

    def _unchanged(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups hold the very objects that were checked, all of them immutable."""
        known = self._checked
        return (
            known is not None
            and sum(map(len, groups)) == len(known)
            and same(values_of(groups), known)
        )

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether groups, states and the parameters without a gradient are what they were."""
        groups = optimizer.param_groups if self._whole else self._groups
        if not self._unchanged(groups):
            self._checked = None
            if [self._group_options(group) for group in groups] != self._options:
                return False
        state = optimizer.state if self._whole else dict.get(optimizer.state, self._active[0])
        if getattr(state, "watch", None) is not self.watch or not self.watch.same:
            return False
        if not self._whole:
            return True
        if len(groups) != len(self._params) or not all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(groups, self._params, strict=True)
        ):
            return False
        self._groups = groups
        return all(p.grad is None for p in self._idle)

    def refresh(self, optimizer: Optimizer) -> bool:
        """Takes the gradients; False, with nothing changed, if the plan is stale."""
        if self.adopted and not self._holds(optimizer):
            return False
        return all(part.refresh() for part in self._parts)

    def forget_gradients(self) -> None:
        """Lets go of the gradients that :meth:`refresh` has taken."""
        for part in self._parts:
            part.forget_gradients()

    def memory(self) -> list[torch.Tensor]:
        """The parameters' memory, as tensors that keep it: what a captured graph writes."""
        return [p.detach() for part in self._parts for p in part.params]

    def norm(self, largest: bool) -> torch.Tensor | None:
        """See :meth:`Backend.norm`, over all devices and ranks and on the first device; None
        without gradients.

        Args:
            largest: whether the norm that is wanted is the largest magnitude.
        """
        found = [part.norm() for part in self._parts]
        if self._ranks is not None:
            return self._ranks.norm(list(zip(self._kinds, found, strict=True)), largest)
        if len(found) < 2:
            return found[0] if found else None
        return add_norms(torch.stack([f.to(found[0].device, non_blocking=True) for f in found]))

    def judge(
        self,
        optimizer: Optimizer,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: backends.Policy,
    ) -> torch.Tensor:
        """See :meth:`Backend.judge`; the verdict is on the first device.

        It is a new tensor unless it is on a GPU, where a captured graph goes on reading it.
        """
        known = optimizer.verdict
        backend, device = self._judging(optimizer, found)
        if capturing():
            if known is None:
                raise RuntimeError("a step that is captured needs one before it that judges as it")
            optimizer.captured.append(known)
        if known is None:
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64, device=device)
        else:
            verdict = known.to(device, copy=device.type == "cpu")
        scale, inf = (
            None if t is None else t.to(device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        found = None if found is None else found.to(device)
        backend.judge(verdict, found, scale, inf, policy)
        return verdict

    def _judging(
        self, optimizer: Optimizer, found: torch.Tensor | None
    ) -> tuple[backends.Backend, torch.device]:
        """The backend and the device of verdicts; where there is nothing to step, too, since other
        ranks may have found something."""
        if self._parts:
            return self._parts[0].backend, self._parts[0].table.steps.device
        known = found if optimizer.verdict is None else optimizer.verdict
        if known is None or known.device.type == "cpu":
            return backends.BACKENDS["reference"], torch.device("cpu")
        return backends.choose(known.device, optimizer.backend), known.device

    def stage(self, verdict: torch.Tensor | None) -> None:
        """Derives the numbers of the next step that can fail; nothing is changed.

        Raises:
            ValueError: a step counter that is not a count.
        """
        for part in self._parts:
            part.stage(self._here(verdict, part))

    def start(self) -> int:
        """Starts to bring paged states to their devices; nothing is changed. Returns how many pages
        there are of them."""
        return sum(part.start() for part in self._parts)

    def run(self, verdict: torch.Tensor | None, zero_grads: bool) -> None:
        """The step, with the gradients that refresh has taken and the numbers that were staged."""
        self.changed = False
        grads = [grad for part in self._parts for grad in part.grads] if zero_grads else []
        # The sweep of one parameter would zero what that of another still has to read.
        together = zero_grads and share_memory(grads)
        for part in self._parts:
            try:
                part.run(self._here(verdict, part), zero_grads and not together)
            finally:
                self.changed = self.changed or part.changed
        if together:
            for grad in grads:
                zero(grad)
        # Kernels write behind autograd's back: it must still see that saved weights changed.
        torch.autograd.graph.increment_version(self._versioned)

    @staticmethod
    def _here(verdict: torch.Tensor | None, part: Part) -> torch.Tensor | None:
        device = part.table.steps.device
        return None if verdict is None else verdict.to(device, non_blocking=True)

    def telemetry(self, groups: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Of each group, its columns summed over rows and ranks, on the first device: see RowTable.

        Where parameters are sharded all ranks must ask."""
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


def _forgetting(
    reference: weakref.ref[Optimizer], param: torch.Tensor | None
) -> Callable[[Watch], None]:
    """What a watch calls: the optimizer drops the plan of this watch, which is of one parameter, or
    of all for None."""

    def forget(watch: Watch) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.forget_plan(watch, param)

    return forget
