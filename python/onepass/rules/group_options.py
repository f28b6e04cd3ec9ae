"""Options that a parameter group can omit: their defaults and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..formats import STATE_FORMATS, VERSION, WEIGHT_FORMATS
from .option_checks import check_choice, check_flag, check_fraction, check_seed


@dataclass(frozen=True)
class Keyword:
    """A keyword that every optimizer class takes.

    Attributes:
        name: the keyword, which is also the key in a parameter group.
        default: the value if the keyword or the key is missing.
        check: called with name and value; raises a ValueError that names the keyword.
        class_default: the class attribute that holds the default of the constructor; empty if all
            classes have the same default.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None]
    class_default: str = ""


def _check_states(name: str, value: Any) -> None:
    check_choice(name, value, STATE_FORMATS)


def _check_weights(name: str, value: Any) -> None:
    check_choice(name, value, WEIGHT_FORMATS)


def unless_none(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Wraps a check so that None is accepted."""
    return lambda name, value: None if value is None else check(name, value)


GROUP_KEYWORDS = (
    Keyword("maximize", False, check_flag),
    Keyword("decoupled_weight_decay", False, check_flag, "decoupled"),
    Keyword("states", "fp32", _check_states, "default_states"),
    Keyword("weights", "native", _check_weights),
    Keyword("ema_decay", None, unless_none(check_fraction)),
    Keyword("seed", 0, check_seed),
)
"""Options that every class has, also per parameter group."""

DEFAULTS: dict[str, Any] = {
    **{keyword.name: keyword.default for keyword in GROUP_KEYWORDS},
    "eps_in_sqrt": False,
    "cautious_weight_decay": False,
    "format_version": VERSION,
}
"""The value of each option that is missing in a parameter group."""


def option(group: Mapping[str, Any], name: str) -> Any:
    """An option of a group, or its default.

    A group stores an option of :data:`DEFAULTS` only if the value differs from the default. A group
    with default options therefore has exactly the keys of torch.optim, which
    torch.distributed.checkpoint requires.
    """
    return group.get(name, DEFAULTS[name])


def drop_defaults(group: dict[str, Any], named: frozenset[str]) -> None:
    """Removes the options of a group that equal their default, except the keys in ``named``."""
    for key in [k for k, value in DEFAULTS.items() if k not in named and k in group]:
        if group[key] == DEFAULTS[key]:
            del group[key]
