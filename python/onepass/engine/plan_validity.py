"""Checks whether a plan still matches the groups and states that it was built from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

from ..rules import Rule
from ..rules.group_options import option
from ..rules.option_checks import is_immutable
from .plan_request import PlanRequest
from .state_tracking import Watch


class PlanValidity:
    """Compares parameter groups and states with those that a plan was built from.

    Args:
        request: see :class:`PlanRequest`.
        watch: receives the change reports of the state dictionaries.
    """

    def __init__(self, request: PlanRequest, watch: Watch) -> None:
        self._rule, self._groups, self._whole = request.rule, request.groups, request.whole
        self._watch = watch
        active = [member.param for member in request.members]
        self._first = active[0] if active else None
        self._params = [list(group["params"]) for group in self._groups] if self._whole else []
        stepped = set(active)
        self._idle = [p for params in self._params for p in params if p not in stepped]
        self._options = [_entry_options(self._rule, group) for group in self._groups]
        self._checked: list[Any] | None = None

    def check_options(self, check: Callable[[Mapping[str, Any]], None]) -> None:
        """Checks the options of all groups; unchanged immutable values are checked only once.

        Args:
            check: raises ValueError if an option of a group is out of range.

        Raises:
            ValueError: an option is out of range.
        """
        if self._checked is None:
            for group in self._groups:
                check(group)
            if self._whole and all(map(is_immutable, _options_of(self._groups))):
                self._checked = list(_values_of(self._groups))

    def holds(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Whether groups, states and the set of parameters without a gradient are unchanged.

        Args:
            groups: ``optimizer.param_groups``.
            state: ``optimizer.state``.
        """
        if not self._whole:
            groups = self._groups
        if not self._unchanged(groups):
            self._checked = None
            if [_entry_options(self._rule, group) for group in groups] != self._options:
                return False
        watched = state if self._whole else dict.get(state, self._first)
        if getattr(watched, "watch", None) is not self._watch or not self._watch.same:
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

    def _unchanged(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups hold the same objects as at the last check, all of them immutable."""
        known = self._checked
        return (
            known is not None
            and sum(map(len, groups)) == len(known)
            and _same(_values_of(groups), known)
        )


def _entry_options(rule: Rule, group: dict[str, Any]) -> tuple[Any, ...]:
    """The options that are fixed when entries are made; other options are read at every step."""
    chosen = rule.of(group)
    return (
        chosen.name,
        chosen.flag_bits(group),
        *(group.get(name) for name in rule.laid_out_by),
        option(group, "states"),
        option(group, "weights"),
        option(group, "ema_decay") is None,
        len(group["params"]),
    )


def _same(found: Iterable[Any], known: Sequence[Any]) -> bool:
    """Whether two sequences of equal length hold the same objects."""
    return all(map(is_, found, known))


def _values_of(groups: list[dict[str, Any]]) -> Iterable[Any]:
    """The values of all group keys, including ``params``."""
    return chain.from_iterable(group.values() for group in groups)


def _options_of(groups: list[dict[str, Any]]) -> Iterable[Any]:
    """The values of all group keys except ``params``."""
    return (value for group in groups for key, value in group.items() if key != "params")
