"""The plan: an optimizer's parameter list flattened once, and the checks that keep it true.

A step costs reading the gradients and comparing what is there with what the plan was made for:
identities in Python, pointers and layouts in the backend. Whatever changed (a parameter without a
gradient, a replaced state, a moved tensor, another option of a group), the plan is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from . import backends
from .arena import Arena
from .backends.base import same_layout
from .checks import check_tensors, check_weight_format
from .formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, scale_key
from .rules import HYPER_WIDTH
from .states import fill, fit_companion, fit_states, packed_order, stale_keys, state_layouts

if TYPE_CHECKING:
    from .optim.base import Optimizer


class Watch:
    """What the dictionaries of a plan's states report to: same until an entry is replaced."""

    __slots__ = ("same",)

    def __init__(self) -> None:
        self.same = True


class ParamState(dict[str, Any]):
    """A parameter's entry of ``optimizer.state``: a dictionary that reports when it changes.

    Comparing every state of every parameter at every step would be a quarter of the host's time.
    Copies and pickles are plain dictionaries.

    Attributes:
        form: name of the format of the states, where their tensors do not tell.
    """

    __slots__ = ("form", "watch")
    form: str
    watch: Watch

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _reporting(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def report(self: ParamState, *args: Any, **kwargs: Any) -> Any:
        watch = getattr(self, "watch", None)
        if watch is not None:
            watch.same = False
        return method(self, *args, **kwargs)

    return report


for _name in (
    "__setitem__",
    "__delitem__",
    "__ior__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
):
    setattr(ParamState, _name, _reporting(_name))


class Row:
    """A row of the hyperparameter table: the parameters of one group that took the same steps.

    Attributes:
        group: the parameter group.
        step: their step counter, fp32, one tensor that all of them share as state["step"].
        first: their states are new.
    """

    __slots__ = ("first", "group", "step")

    def __init__(self, group: dict[str, Any], step: torch.Tensor, first: bool) -> None:
        self.group, self.step, self.first = group, step, first


class _Part:
    """The entries of one device."""

    def __init__(self, backend: backends.Backend, entries: list[backends.Entry]) -> None:
        self.backend = backend
        self.params = [entry.param for entry in entries]
        self.prepared = backend.prepare(entries)
        # Gradients that lie in memory in another order than their parameter are copied for a step.
        self.relaid = [
            i for i, p in enumerate(self.params) if p.grad is None or not same_layout(p, p.grad)
        ]
        self._copies: list[torch.Tensor] = []

    def refresh(self) -> bool:
        """Reads the gradients; False, with nothing changed, when the plan is no longer true."""
        params = self.params
        chunk = self.backend.chunk or len(params)
        self._copies = []
        for first in range(0, len(params), chunk):
            part = params[first : first + chunk]
            grads = [grad for p in part if (grad := p.grad) is not None]
            if len(grads) != len(part):
                return False
            for i in self.relaid:
                if first <= i < first + chunk:
                    grad = grads[i - first]
                    copy = torch.empty_like(params[i], dtype=grad.dtype).copy_(grad)
                    grads[i - first] = copy
                    self._copies.append(copy)
            if not self.backend.refresh(self.prepared, grads, first):
                return False
        return True

    def run(self, hyper: torch.Tensor, counters: torch.Tensor) -> None:
        """The step over this device's entries."""
        self.backend.run(self.prepared, hyper, counters)
        self._copies = []


def _same(found: Iterable[Any], known: Sequence[Any]) -> bool:
    """Whether two sequences of equal length hold the same objects."""
    return all(map(is_, found, known))


class Plan:
    """Flattens an optimizer's groups.

    Everything is checked before any state is made, so that an error leaves the optimizer, its
    states and its parameters as they were.

    Raises:
        ValueError: a group option, parameter or gradient that no rule can work on; names it.
        RuntimeError: a sparse gradient, or no backend for a device.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        rule = optimizer.rule
        groups = optimizer.param_groups
        self._optimizer = optimizer
        self._params = [list(group["params"]) for group in groups]
        self._active = [p for params in self._params for p in params if p.grad is not None]
        self._idle = [p for params in self._params for p in params if p.grad is None]
        self._options = [self._group_options(group) for group in groups]
        self._state = optimizer.state

        arena = Arena()
        number = -1
        for group in groups:
            optimizer.check_options(group)
            form, weight = STATE_FORMATS[group["states"]], WEIGHT_FORMATS[group["weights"]]
            slots = rule.state_slots(rule.flag_bits(group))
            for param in group["params"]:
                number += 1
                if param.grad is None:
                    continue
                which = f"parameter {number} of shape {tuple(param.shape)}"
                check_tensors(param, param.grad, which)
                check_weight_format(param, group["weights"], which)
                state = optimizer.state.get(param, {})
                for _, name in slots:
                    if state.get(name) is None:
                        for layout in state_layouts(param, name, form):
                            arena.want(layout, param.device)
        chosen = {
            device: backends.choose(device, optimizer.backend)
            for device in dict.fromkeys(p.device for p in self._active)
        }

        # New states are gathered first: nothing is kept of them if memory runs out on the way.
        fresh: list[tuple[torch.Tensor, StateFormat, dict[str, Any]]] = []
        rows: dict[tuple[int, float, bool], Row] = {}
        row_numbers: dict[tuple[int, float, bool], int] = {}
        entries: dict[torch.device, list[backends.Entry]] = {device: [] for device in chosen}
        number = -1
        for index, group in enumerate(groups):
            flags = rule.flag_bits(group)
            form, weight = STATE_FORMATS[group["states"]], WEIGHT_FORMATS[group["weights"]]
            slots = rule.state_slots(flags)
            for param in group["params"]:
                number += 1
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                which = f"parameter {number} of shape {tuple(param.shape)}"
                saved_as = getattr(state, "form", "")
                held = fit_states(state, param, rule, form, which, saved_as=saved_as)
                first = False
                for _, name in slots:
                    if name in held:
                        continue
                    first = True
                    for layout in state_layouts(param, name, form):
                        held[layout.key] = arena.take(layout, param.device)
                    start = rule.initial_value(name, group)
                    if start:
                        fill(held, name, form, start)
                companion = fit_companion(state, param, weight, which)
                if companion is not None:
                    held[weight.key] = companion
                step = state.get("step")
                count = 0.0 if step is None else float(step)
                key = (index, count, first)
                if key not in rows:
                    shared = torch.tensor(count, dtype=torch.float32)
                    row_numbers[key] = len(rows)
                    rows[key] = Row(group, shared, first)
                order = packed_order(param, form) if slots else {}
                fresh.append((param, form, {**held, **order, "step": rows[key].step}))
                entries[param.device].append(
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
                        rule=rule,
                        flags=flags,
                        row=row_numbers[key],
                        param_id=number,
                    )
                )
        self._rows = list(rows.values())
        self._hyper = torch.zeros(max(1, len(self._rows)), HYPER_WIDTH)
        self._counters = torch.zeros(max(1, len(self._rows)), 2, dtype=torch.int64)
        self._parts = [_Part(backend, entries[device]) for device, backend in chosen.items()]

        self._watch = Watch()
        for param, form, held in fresh:
            param_state = optimizer.state[param]
            if not isinstance(param_state, ParamState):
                param_state = optimizer.state[param] = ParamState(param_state)
            # Scales and companions of a format that the group no longer has.
            for stale in stale_keys(param_state, held, rule):
                del param_state[stale]
            param_state.update(held)
            param_state.form = form.name
            param_state.watch = self._watch
        self._dicts = list(optimizer.state.values())

    def _group_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What entries were made from; the other options are read at every step."""
        return (
            self._optimizer.rule.flag_bits(group),
            group["states"],
            group["weights"],
            len(group["params"]),
        )

    def _holds(self) -> bool:
        """Whether groups, states and the parameters without a gradient are what they were."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if [self._group_options(group) for group in groups] != self._options:
            return False
        if not all(
            _same(g["params"], known) for g, known in zip(groups, self._params, strict=True)
        ):
            return False
        state = optimizer.state
        if state is not self._state or len(state) != len(self._dicts):
            return False
        if not self._watch.same or not _same(state.values(), self._dicts):
            return False
        return all(p.grad is None for p in self._idle)

    def step(self) -> bool:
        """Takes a step; False, with nothing changed, when the plan is no longer true.

        Raises:
            ValueError: an option of a group is out of range.
        """
        if not self._holds() or not all(part.refresh() for part in self._parts):
            return False
        steps = self._derive()
        for part in self._parts:
            part.run(self._hyper, self._counters)
        for row, step in zip(self._rows, steps, strict=True):
            row.step.fill_(step)
            row.first = False
        # Kernels write behind autograd's back: it must still see that saved weights changed.
        torch.autograd.graph.increment_version(self._active)
        return True

    def _derive(self) -> list[int]:
        """Fills the tables of this step; returns the step of each row, counted from 1."""
        rule = self._optimizer.rule
        for group in self._optimizer.param_groups:
            self._optimizer.check_options(group)
        steps, hyper, counters = [], [], []
        for row in self._rows:
            group = row.group
            step = int(row.step) + 1
            values = rule.derive(group, step, row.first)
            scale = -1.0 if group["maximize"] else 1.0
            hyper.append([scale, *values, *[0.0] * (HYPER_WIDTH - 1 - len(values))])
            counters.append([int(group["seed"]), step])
            steps.append(step)
        if steps:
            self._hyper.copy_(torch.tensor(hyper, dtype=torch.float64))
            self._counters.copy_(torch.tensor(counters, dtype=torch.int64))
        return steps
