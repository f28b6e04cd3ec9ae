"""``optimizer.state`` and its entries: dictionaries that report their changes to a plan.

The reports replace a comparison of all states at every step, which would take a quarter of the host
time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Watch:
    """Receives the change reports of the state dictionaries of one plan.

    Args:
        forget: drops the plan, so that replaced states are freed immediately. The callable must not
            keep the plan alive.

    Attributes:
        same: whether all entries are unchanged since the plan was built.
    """

    __slots__ = ("_forget", "same")

    def __init__(self, forget: Callable[[Watch], None]) -> None:
        self.same = True
        self._forget = forget

    def changed(self) -> None:
        """Records that an entry was replaced or removed, and drops the plan."""
        if self.same:
            self.same = False
            self._forget(self)


class ParamState(dict[str, Any]):
    """A parameter's entry of ``optimizer.state``: a dictionary that reports when it changes.

    Copies and pickles are plain dictionaries.

    Attributes:
        fresh: see :class:`onepass.engine.hyper_table.Row`.
        begun: keys of states that the rule's first step does not read; see :meth:`started`.
        watch: the watch of the plan that uses the states.
    """

    __slots__ = ("begun", "fresh", "watch")
    begun: tuple[str, ...]
    fresh: torch.Tensor
    watch: Watch

    def started(self) -> dict[str, Any]:
        """The entries to save in a state dict.

        SGD's first step with momentum ignores ``momentum_buffer``. A buffer that no step has
        written is saved if ``step`` is 0, because loading then also ignores it. It is omitted if
        momentum was enabled after the first step, because loading would treat its zeros as values.
        """
        keys = getattr(self, "begun", ())
        if keys and float(self.fresh) != 0.0 and float(self["step"]) != 0.0:
            return {key: value for key, value in self.items() if key not in keys}
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.started(),)


class OptimizerState(defaultdict[Any, Any]):
    """``optimizer.state``: a dictionary of :class:`ParamState` that reports its changes and its own
    replacement."""

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
    """``optimizer.state`` with paged states: a read waits until the states are on the host.

    Args:
        settle: waits for states that are being copied; raises if an earlier step failed halfway.
    """

    def __init__(self, settle: Callable[[], None], *args: Any) -> None:
        super().__init__(*args)
        self.settle = settle


def _settling(name: str) -> Callable[..., Any]:
    """A method of dict that first waits for paged states."""
    method = getattr(dict, name)

    @wraps(method)
    def settled(self: PagedState, *args: Any) -> Any:
        self.settle()
        return method(self, *args)

    return settled


# Overriding __iter__ as well makes dict(state) read the values through __getitem__.
for _name in ("__getitem__", "__iter__", "get", "items", "values"):
    setattr(PagedState, _name, _settling(_name))


def _reporting(name: str) -> Callable[..., Any]:
    """A method of dict that first reports a change to the watch."""
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
