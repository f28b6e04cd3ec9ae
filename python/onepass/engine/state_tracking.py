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
    """What the dictionaries of a plan's states report to.

    Args:
        forget: drops the plan, so that states which were replaced are freed at once. It must not
            keep the plan alive.

    Attributes:
        same: whether every entry is still the one that the plan was built from.
    """

    __slots__ = ("_forget", "same")

    def __init__(self, forget: Callable[[Watch], None]) -> None:
        self.same = True
        self._forget = forget

    def changed(self) -> None:
        """An entry has been replaced or removed."""
        if self.same:
            self.same = False
            self._forget(self)


class ParamState(dict[str, Any]):
    """A parameter's entry of ``optimizer.state``: a dictionary that reports when it changes.

    Copies and pickles are plain dictionaries.

    Attributes:
        fresh: see :class:`onepass.engine.hyper_table.Row`.
        begun: keys of states that the rule's first step does not read; see :meth:`started`.
        watch: of the plan that has the states.
    """

    __slots__ = ("begun", "fresh", "watch")
    begun: tuple[str, ...]
    fresh: torch.Tensor
    watch: Watch

    def started(self) -> dict[str, Any]:
        """The entries as they are saved.

        The first step of SGD ignores ``momentum_buffer``. It is still to come where ``step`` is 0.
        Where momentum was switched on later, and no step has been taken since, the buffer is left
        out: zeros would be taken for the buffer of an earlier step.
        """
        keys = getattr(self, "begun", ())
        if keys and float(self.fresh) != 0.0 and float(self["step"]) != 0.0:
            return {key: value for key, value in self.items() if key not in keys}
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.started(),)


class OptimizerState(defaultdict[Any, Any]):
    """``optimizer.state``: a dictionary of :class:`ParamState` that reports when it changes, or is
    itself replaced."""

    watch: Watch

    def __init__(self, *args: Any) -> None:
        super().__init__(ParamState, *args)

    def __missing__(self, key: Any) -> ParamState:
        self[key] = made = ParamState()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (ParamState, dict(self))

    def __del__(self) -> None:
        watch = getattr(self, "watch", None)
        if watch is not None:
            watch.changed()


class PagedState(OptimizerState):
    """``optimizer.state`` where states are paged: whoever reads it waits until they are there.

    Args:
        settle: waits for states that are on their way; raises when a step was left half taken.
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
            watch.changed()
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
