"""Parameter groups, what a plan compares of them, and what it reads of their states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch

from .formats import VERSION

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


def same(found: Iterable[Any], known: Sequence[Any]) -> bool:
    """Whether two sequences of equal length hold the same objects."""
    return all(map(is_, found, known))


def values_of(groups: list[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(group.values() for group in groups)


def options_of(groups: list[dict[str, Any]]) -> Iterable[Any]:
    return (value for group in groups for key, value in group.items() if key != "params")


def is_fixed(value: Any) -> bool:
    """Whether a value cannot change without being replaced."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return value is None or type(value) in (bool, int, float, str)


class Reader:
    """Reads counters, each tensor once: many parameters share one, and it may be on a GPU."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}

    def __call__(self, tensor: torch.Tensor | None, which: str) -> float:
        """The value; 0 for None.

        Raises:
            ValueError: it is no number; names the parameter.
        """
        if tensor is None:
            return 0.0
        key = id(tensor)
        if key not in self._known:
            try:
                self._known[key] = float(tensor)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"state['step'] of {which} must be a tensor of one number; got {tensor!r}"
                ) from error
        return self._known[key]
