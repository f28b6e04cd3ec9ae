"""What a plan is made from, and the interfaces of the features that change how a plan runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..formats import StateFormat
from ..rules import Rule
from . import backends
from .device_plan import DevicePlan
from .hyper_table import RowTable
from .state_layouts import Home
from .state_tracking import Watch
from .tensor_access import unwrapped

ProcessGroups = tuple[Any, ...]
"""The process groups over which a parameter is sharded; empty if every rank has all of it."""


class Member(NamedTuple):
    """A parameter of an optimizer.

    Attributes:
        param: the tensor.
        number: keys its random bits: its position in the optimizer, unless it was given one.
        at, group: its group, and the position of that.
    """

    param: torch.Tensor
    number: int
    at: int
    group: dict[str, Any]

    @property
    def name(self) -> str:
        """What messages of errors call it."""
        return f"parameter {self.number} of shape {tuple(self.param.shape)}"


class ParamView(Protocol):
    """A parameter as this rank steps it: all of an ordinary parameter, or its shard of a DTensor.

    Attributes:
        local: the plain tensor that is stepped.
        groups: process groups over which a DTensor is sharded; None for an ordinary parameter.
    """

    @property
    def local(self) -> torch.Tensor: ...

    @property
    def groups(self) -> ProcessGroups | None: ...

    def check(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain tensors of the parameter and its gradient, or ValueError."""

    def inner(self, state: Mapping[str, Any], rule: Rule) -> Mapping[str, Any]:
        """The parameter's entry of ``optimizer.state`` with plain tensors, of this rank."""

    def wrapped(self, held: dict[str, Any], rule: Rule, form: StateFormat) -> dict[str, Any]:
        """Plain tensors of this rank as ``optimizer.state`` holds them."""

    def start(self, form: StateFormat) -> int:
        """The element index at which its random bits begin."""

    def version_holder(self) -> torch.Tensor:
        """A tensor with the version counter of the parameter."""


class PlainParam:
    """The :class:`ParamView` of an ordinary parameter."""

    __slots__ = ("local",)
    groups: None = None

    def __init__(self, param: torch.Tensor) -> None:
        self.local = param

    def check(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`ParamView`; the gradient is unwrapped."""
        assert self.local.grad is not None
        return self.local, unwrapped(self.local.grad, which)

    def inner(self, state: Mapping[str, Any], rule: Rule) -> Mapping[str, Any]:
        """The state itself."""
        return state

    def wrapped(self, held: dict[str, Any], rule: Rule, form: StateFormat) -> dict[str, Any]:
        """The tensors themselves."""
        return held

    def start(self, form: StateFormat) -> int:
        """0."""
        return 0

    def version_holder(self) -> torch.Tensor:
        """The parameter itself."""
        return self.local


class RankSums(Protocol):
    """Sums over the ranks that have shards of the parameters, or parameters of their own."""

    def norm(self, parts: list[tuple[ProcessGroups, torch.Tensor]], largest: bool) -> torch.Tensor:
        """Combines what :meth:`Backend.norm` returned for each part of a plan on each rank."""

    def sums(
        self, parts: list[tuple[ProcessGroups, torch.Tensor]], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """The sum of float64 tensors of a shape over the parts and ranks."""


class PlanFeatures(Protocol):
    """What sharding and paging change in one plan.

    Attributes:
        ranks: sums over ranks; None where there is one rank.
    """

    ranks: RankSums | None

    def view(self, param: torch.Tensor) -> ParamView:
        """A parameter as this rank steps it."""

    def place_states(self) -> None:
        """Decides which states are paged, and waits for states that are being copied."""

    def reserve_memory(self) -> None:
        """Reserves host memory for the states that are paged; MemoryError if there is none."""

    def home(self, param: torch.Tensor) -> Home | None:
        """Where the states of a parameter are stored; None for the parameter's device."""

    def make_part(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable,
        owners: list[torch.Tensor],
        sharded: bool,
    ) -> DevicePlan:
        """The part of a plan with these entries; see :class:`DevicePlan`. sharded: the owners are
        DTensors."""


@dataclass(frozen=True)
class PlanRequest:
    """What :func:`onepass.engine.plan_builder.make_plan` needs of an optimizer; only read.

    Attributes:
        rule: of the optimizer.
        groups: the parameter groups that the plan depends on.
        members: parameters with gradients.
        state: ``optimizer.state``.
        whole: whether the plan is of the whole optimizer. A plan of one parameter, whose gradient
            is released, does not depend on the others.
        backend: name of the backend; None for the first that serves each device.
        measured: whether the step measures telemetry.
        check_options: raises ValueError for an option of a group that is out of range.
        forget: drops the plan whose watch it is given. It must not keep the optimizer alive.
        settle: waits for paged states that are being copied; None where states are not paged.
        features: sharding and paging.
    """

    rule: Rule
    groups: list[dict[str, Any]]
    members: list[Member]
    state: Mapping[Any, Any]
    whole: bool
    backend: str | None
    measured: bool
    check_options: Callable[[Mapping[str, Any]], None]
    forget: Callable[[Watch], None]
    settle: Callable[[], None] | None
    features: PlanFeatures
