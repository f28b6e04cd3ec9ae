"""Fits the states of a plan's parameters: reuses, converts or creates them.

The entries of ``optimizer.state`` are not changed, so an error leaves the optimizer unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.group_options import option
from .hyper_table import History, step_number
from .plan_request import Member, ParamView, PlanRequest
from .state_allocator import Arena
from .state_conversion import fill, fit_companion, fit_ema, fit_states, full_precision
from .state_layouts import EMA, Home, state_layouts


class Fitted(NamedTuple):
    """A parameter with the states that its next step reads and writes.

    Attributes:
        member: the parameter.
        view: the part of the parameter that this rank updates.
        tensors: state key -> plain tensor of this rank, without counters.
        history: the counters of the parameter.
    """

    member: Member
    view: ParamView
    tensors: dict[str, torch.Tensor]
    history: History


def fit_members(request: PlanRequest, views: list[ParamView]) -> list[Fitted]:
    """The states of all members, in the formats of their groups.

    Raises:
        ValueError: a state or a counter does not belong to its parameter; the message names it.
        MemoryError: the host has too little free memory for paged states.
    """
    request.features.reserve_memory()
    homes = [request.features.home(member.param) for member in request.members]
    fitter = _Fitter(request, views, homes)
    rows = zip(request.members, views, homes, strict=True)
    return [fitter.fit(member, view, home) for member, view, home in rows]


class _Fitter:
    """Fits one parameter after another, with one arena for new states and one cache of counters."""

    def __init__(
        self, request: PlanRequest, views: list[ParamView], homes: list[Home | None]
    ) -> None:
        self.rule, self.state = request.rule, request.state
        self.arena, self.read = Arena(), Reader()
        for member, view, home in zip(request.members, views, homes, strict=True):
            if home is None:
                self._announce(member, view)

    def _announce(self, member: Member, view: ParamView) -> None:
        """Reserves arena space for the states that the parameter lacks."""
        group = member.group
        rule = self.rule.of(group)
        state, form = self.state.get(member.param, {}), STATE_FORMATS[option(group, "states")]
        for _, name in rule.state_slots(rule.flag_bits(group)):
            if state.get(name) is None:
                for layout in state_layouts(view.local, name, rule.format_of(name, form)):
                    self.arena.want(layout, view.local.device)

    def fit(self, member: Member, view: ParamView, home: Home | None) -> Fitted:
        """Fits the states of a parameter and reads its counters."""
        rule, which = self.rule.of(member.group), member.name
        state = self.state.get(member.param, {})
        tensors, fresh = self._tensors(member, view, home, state)
        count = self.read(state.get("step"), which)
        if rule.needs_first and state.get("step") is None:
            # State dicts may omit the count: an existing buffer implies at least one step.
            count = float(any(state.get(key) is not None for key in rule.keys))
        step_number(count, which)  # raises if the count is invalid
        scalar_states = tuple(
            self.read(state.get(scalar.key), which, scalar.key, scalar.starts_at)
            for scalar in rule.scalar_states
        )
        for scalar, value in zip(rule.scalar_states, scalar_states, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"state[{scalar.key!r}] of {which} must be finite; got {value}")
        return Fitted(member, view, tensors, History(count, fresh, scalar_states))

    def _tensors(
        self, member: Member, view: ParamView, home: Home | None, state: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """The state tensors by key, and whether they are fresh.

        States are fresh if no step has been taken with them and the rule's first step differs from
        later steps.

        Args:
            state: the parameter's entry of ``optimizer.state``.
        """
        group, which, param = member.group, member.name, view.local
        rule = self.rule.of(group)
        form = STATE_FORMATS[option(group, "states")]
        saved = view.inner(state, rule)
        held = fit_states(saved, param, rule, form, which, home=home)
        fresh = rule.needs_first and self._is_fresh(state, which)
        for _, name in rule.state_slots(rule.flag_bits(group)):
            if name in held:
                continue
            fresh = rule.needs_first
            for layout in state_layouts(param, name, rule.format_of(name, form)):
                new = self.arena.take(layout, param.device) if home is None else home.empty(layout)
                held[layout.key] = new
            start = rule.initial_value(name, group)
            if rule.kind_of(name) == "weight":
                held[name].copy_(full_precision(param, saved))
            elif start:
                fill(held, name, form, start)
        weight = WEIGHT_FORMATS[option(group, "weights")]
        companion = fit_companion(saved, param, weight, which, home=home)
        if companion is not None:
            held[weight.key] = companion
        if option(group, "ema_decay") is not None:
            held[EMA] = fit_ema(saved, param, which, home=home)
        return held, fresh

    def _is_fresh(self, state: Mapping[str, Any], which: str) -> bool:
        """Whether no step has been taken with the states of an entry.

        An entry that was loaded, copied or replaced is fresh if its step counter is 0.
        """
        fresh = getattr(state, "fresh", None)
        if fresh is not None:
            return self.read(fresh, which) != 0.0
        return "step" in state and self.read(state["step"], which) == 0.0


class Reader:
    """Reads each counter tensor once, because parameters share counters and a GPU read is slow."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}

    def __call__(
        self, tensor: torch.Tensor | None, which: str, name: str = "step", absent: float = 0.0
    ) -> float:
        """The value of a counter.

        Args:
            tensor: a tensor with one element, or None.
            which, name: parameter and state key, for error messages.
            absent: the result for None.

        Raises:
            ValueError: the value is not a single number; the message names the parameter.
        """
        if tensor is None:
            return absent
        key = id(tensor)
        if key not in self._known:
            try:
                self._known[key] = float(tensor)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"state[{name!r}] of {which} must be a tensor with one element; got {tensor!r}"
                ) from error
        return self._known[key]
