"""Options that a parameter group need not name, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats import VERSION

DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "decoupled_weight_decay": False,
    "eps_in_sqrt": False,
    "states": "fp32",
    "weights": "native",
    "ema_decay": None,
    "seed": 0,
    "format_version": VERSION,
}
"""Options that a group need not name, with what a missing key stands for."""


def option(group: Mapping[str, Any], name: str) -> Any:
    """An option of a group. Groups name only options of :data:`DEFAULTS` that are others, so that
    with default options they have the keys of torch.optim's, and no others, as
    torch.distributed.checkpoint asks."""
    return group.get(name, DEFAULTS[name])


def drop_defaults(group: dict[str, Any], named: frozenset[str]) -> None:
    """Removes options that have their default, unless their keys are among those named."""
    for key in [k for k, value in DEFAULTS.items() if k not in named and k in group]:
        if group[key] == DEFAULTS[key]:
            del group[key]
