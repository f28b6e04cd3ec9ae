"""The inputs of a plan, and the interfaces of sharding and paging, which change how it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..formats import StateFormat
from ..rules import Rule
from . import backends
from .device_plan import DevicePlan
from .hyper_table import RowTable
from .joint_table import JointTable
from .state_layouts import Home
from .state_tracking import Watch
from .tensor_access import unwrapped
from .whole_positions import Place, whole_place

ProcessGroups = tuple[Any, ...]
"""The process groups over which a parameter is sharded; empty if every rank has all of it."""


class Member(NamedTuple):
    """A parameter of an optimizer.

    Attributes:
        param: the tensor.
        number: keys the random bits of the parameter. It is the parameter's position in the
            optimizer unless ``number_parameters`` assigned a number.
        at: position of the parameter's group.
        group: the parameter's group.
    """

    param: torch.Tensor
    number: int
    at: int
    group: dict[str, Any]

    @property
    def name(self) -> str:
        """The parameter's name in error messages."""
        return f"parameter {self.number} of shape {tuple(self.param.shape)}"


class ParamView(Protocol):
    """The part of a parameter that this rank updates: an ordinary parameter, or a DTensor's shard.

    Attributes:
        local: the plain tensor that the step updates.
        groups: process groups over which a DTensor is sharded; None for an ordinary parameter.
    """

    @property
    def local(self) -> torch.Tensor:
        """The plain tensor that the step updates."""
        ...

    @property
    def groups(self) -> ProcessGroups | None:
        """Process groups over which a DTensor is sharded; None for an ordinary parameter."""
        ...

    def check(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain tensors of the parameter and its gradient.

        Raises:
            ValueError: the gradient cannot be used.
        """

    def inner(self, state: Mapping[str, Any], rule: Rule) -> Mapping[str, Any]:
        """The parameter's entry of ``optimizer.state`` with the plain tensors of this rank."""

    def wrapped(self, held: dict[str, Any], rule: Rule, form: StateFormat) -> dict[str, Any]:
        """Converts plain tensors of this rank to the form that ``optimizer.state`` stores."""

    def start(self, form: StateFormat) -> int:
        """The element index at which the parameter's random bits begin."""

    def version_holder(self) -> torch.Tensor:
        """A tensor that shares the version counter of the parameter."""

    def place(self) -> Place:
        """The place of ``local`` in the whole parameter.

        Raises:
            ValueError: the placements of a DTensor are not supported.
        """


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
        """Returns the state unchanged."""
        return state

    def wrapped(self, held: dict[str, Any], rule: Rule, form: StateFormat) -> dict[str, Any]:
        """Returns the tensors unchanged."""
        return held

    def start(self, form: StateFormat) -> int:
        """0: this rank has the whole parameter."""
        return 0

    def version_holder(self) -> torch.Tensor:
        """Returns the parameter."""
        return self.local

    def place(self) -> Place:
        """The whole parameter."""
        return whole_place(self.local)


class RankSums(Protocol):
    """Sums over ranks that have shards of the parameters or different parameters."""

    def norm(self, parts: list[tuple[ProcessGroups, torch.Tensor]], largest: bool) -> torch.Tensor:
        """Combines the results of :meth:`Backend.norm` for all parts of a plan on all ranks.

        Args:
            parts: process groups and float64 [3] of each part on this rank.
            largest: whether the norm is the largest magnitude.
        """

    def sums(
        self, parts: list[tuple[ProcessGroups, torch.Tensor]], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """The sum of float64 tensors of one shape over all parts and ranks."""


class Tally:
    """The number of times that one plan has incremented the version counters of its parameters."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Record(Protocol):
    """The interface of :class:`onepass.engine.change_record.ChangeRecord` for plans."""

    def bits(self, param: torch.Tensor, view: ParamView) -> torch.Tensor:
        """The record of changes of a parameter; see :class:`onepass.engine.backends.Entry`."""

    def begin(self, params: Iterable[torch.Tensor]) -> Tally:
        """The tally of a new plan with these parameters."""


class PlanFeatures(Protocol):
    """The sharding and paging of one plan.

    Attributes:
        ranks: sums over ranks; None for a single rank.
    """

    ranks: RankSums | None

    def view(self, param: torch.Tensor) -> ParamView:
        """The part of a parameter that this rank updates."""

    def place_states(self) -> None:
        """Decides which states are paged, and waits for states that are being copied."""

    def reserve_memory(self) -> None:
        """Reserves host memory for paged states.

        Raises:
            MemoryError: the host has too little free memory.
        """

    def home(self, param: torch.Tensor) -> Home | None:
        """Where the states of a parameter are stored; None for the parameter's device."""

    def make_part(
        self,
        backend: backends.Backend,
        entries: list[backends.Entry],
        table: RowTable | JointTable,
        owners: list[torch.Tensor],
        sharded: bool,
    ) -> DevicePlan:
        """The part of a plan with these entries; see :class:`DevicePlan`.

        Args:
            backend, entries, table, owners: as for :class:`DevicePlan`.
            sharded: whether the owners are DTensors.
        """


@dataclass(frozen=True)
class PlanRequest:
    """The inputs of :func:`onepass.engine.plan_builder.make_plan`; they are only read.

    Attributes:
        rule: the rule of the optimizer.
        groups: the parameter groups that the plan depends on.
        members: parameters with gradients.
        state: ``optimizer.state``.
        whole: whether the plan covers the whole optimizer. With gradient release, each parameter
            has its own plan, which does not depend on other parameters.
        backend: name of the backend; None for the first backend that serves each device.
        measured: whether the step measures telemetry.
        check_options: raises ValueError if an option of a group is out of range.
        forget: drops the plan of the given watch. The callable must not keep the optimizer alive.
        settle: waits for paged states that are being copied; None if states are not paged.
        features: sharding and paging.
        record: the record of changed weights; None if the step does not track them.
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
    record: Record | None
