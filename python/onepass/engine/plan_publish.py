"""Publishes the states of a plan in ``optimizer.state`` after the plan's first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..formats import STATE_FORMATS, scale_key
from ..rules import Rule
from ..rules.group_options import option
from .hyper_table import Row
from .plan_fit import Fitted
from .plan_request import PlanRequest
from .state_conversion import packed_order, stale_keys
from .state_tracking import OptimizerState, PagedState, ParamState, Watch


class NewState(NamedTuple):
    """The new entry of a parameter in ``optimizer.state``.

    Attributes:
        param: the parameter.
        rule: the rule that steps the parameter.
        held: state key -> value, without counters.
        row: the row that holds the counters.
    """

    param: torch.Tensor
    rule: Rule
    held: dict[str, Any]
    row: Row


class Publication:
    """The new states of a plan that are not yet published.

    Args:
        states: the new entry of each member.
        watch: receives the change reports of the state dictionaries.
        whole: whether the plan covers the whole optimizer.
        settle: waits for paged states that are being copied; None if states are not paged.
    """

    def __init__(
        self,
        states: list[NewState],
        watch: Watch,
        whole: bool,
        settle: Callable[[], None] | None,
    ) -> None:
        self._states, self._watch = states, watch
        self._whole, self._settle = whole, settle

    def publish(self, state: Any) -> Any:
        """Writes the states into ``optimizer.state`` and returns its new value.

        From then on, the dictionaries report a replaced or removed entry to the watch.
        """
        for param, rule, held, row in self._states:
            entry = state[param]
            if not isinstance(entry, ParamState):
                entry = state[param] = ParamState(entry)
            # Remove scales and companions of a previous format.
            for stale in stale_keys(entry, held, rule):
                del entry[stale]
            entry.update(held, step=row.step, **row.scalar_states)
            entry.fresh, entry.watch = row.fresh, self._watch
            entry.begun = ()
            if rule.needs_first:
                keys = rule.keys
                entry.begun = (*keys, *map(scale_key, keys))
        if self._whole:
            if self._settle is not None and not isinstance(state, PagedState):
                state = PagedState(self._settle, state)
            elif not isinstance(state, OptimizerState):
                state = OptimizerState(state)
            state.watch = self._watch
        return state


def make_publication(
    request: PlanRequest, fitted: list[Fitted], rows: list[Row], watch: Watch
) -> Publication:
    """The publication of a plan: the fitted states in the form that ``optimizer.state`` stores."""
    states = []
    for one, row in zip(fitted, rows, strict=True):
        rule = request.rule.of(one.member.group)
        states.append(NewState(one.member.param, rule, _published(rule, one), row))
    return Publication(states, watch, request.whole, request.settle)


def _published(rule: Rule, fitted: Fitted) -> dict[str, Any]:
    """The states of a parameter, including those of disabled options, and the stride of packed
    codes."""
    form = STATE_FORMATS[option(fitted.member.group, "states")]
    held: dict[str, Any] = dict(fitted.tensors)
    if any(key in held for key in rule.keys):
        held |= packed_order(fitted.view.local, form)
    return fitted.view.wrapped(held, rule, form)
