"""``optimizer.state`` and its entries: dictionaries that tell a plan when they change.

Comparing every state of every parameter at every step would be a quarter of the host's time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Watch:
    """What the dictionaries of a plan's states report to: same until an entry is replaced."""

    __slots__ = ("same",)

    def __init__(self) -> None:
        self.same = True


class ParamState(dict[str, Any]):
    """A parameter's entry of ``optimizer.state``: a dictionary that reports when it changes.

    Copies and pickles are plain dictionaries.

    Attributes:
        form: name of the format of the states, where their tensors do not tell.
        fresh: see :class:`onepass.rows.Row`.
    """

    __slots__ = ("form", "fresh", "watch")
    form: str
    fresh: torch.Tensor
    watch: Watch

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class OptimizerState(defaultdict[Any, Any]):
    """``optimizer.state``: a dictionary of :class:`ParamState` that reports when it changes."""

    watch: Watch

    def __init__(self, *args: Any) -> None:
        super().__init__(ParamState, *args)

    def __missing__(self, key: Any) -> ParamState:
        self[key] = made = ParamState()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (ParamState, dict(self))


class PagedState(OptimizerState):
    """``optimizer.state`` where states are paged: whoever reads it waits until they are there.

    Args:
        settle: waits for states that are on their way; raises when a step has failed on its way.
    """

    def __init__(self, settle: Callable[[], None], *args: Any) -> None:
        super().__init__(*args)
        self.settle = settle


def _settling(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def settled(self: PagedState, *args: Any) -> Any:
        self.settle()
        return method(self, *args)

    return settled


# __iter__ too: copies of dictionaries that have their own go through __getitem__.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(PagedState, _name, _settling(_name))


def _reporting(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def report(self: ParamState | OptimizerState, *args: Any, **kwargs: Any) -> Any:
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
    setattr(OptimizerState, _name, _reporting(_name))
