"""What a plan compares of the parameter groups and reads of their states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch


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

    def __call__(
        self, tensor: torch.Tensor | None, which: str, name: str = "step", absent: float = 0.0
    ) -> float:
        """The value of a counter; ``absent`` for None.

        Args:
            tensor: of one number.
            which, name: parameter and state key, for the message of an error.
            absent: in place of None.

        Raises:
            ValueError: it is no number; names the parameter.
        """
        if tensor is None:
            return absent
        key = id(tensor)
        if key not in self._known:
            try:
                self._known[key] = float(tensor)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"state[{name!r}] of {which} must be a tensor of one number; got {tensor!r}"
                ) from error
        return self._known[key]
