"""The layout of a plan: entries and table rows, split by device and process groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..formats import STATE_FORMATS, WEIGHT_FORMATS, scale_key
from ..rules import Rule
from ..rules.group_options import option
from . import backends
from .device_plan import DevicePlan
from .hyper_table import History, Row
from .joint_table import make_table
from .plan_fit import Fitted
from .plan_request import PlanRequest, ProcessGroups
from .state_layouts import EMA
from .validation import check_distinct


class PlanLayout(NamedTuple):
    """The parts of a plan.

    Attributes:
        parts: one part for each combination of device and process groups.
        groups: for each part, the process groups over which its parameters are sharded.
        rows: for each member, the row that holds its counters.
    """

    parts: list[DevicePlan]
    groups: list[ProcessGroups]
    rows: list[Row]


class _Place(NamedTuple):
    """The key of a part: entries on one device, sharded over the same process groups if they are
    shards of DTensors."""

    device: torch.device
    groups: ProcessGroups | None


class _Listed:
    """The entries of one place, and the rows of their hyperparameter table."""

    def __init__(self) -> None:
        self.owners: list[torch.Tensor] = []
        self.entries: list[backends.Entry] = []
        # (position of the group, history) -> row
        self.positions: dict[tuple[int, History], int] = {}
        # For each row: its group and history, and the name of its first parameter.
        self.rows: list[tuple[dict[str, Any], History]] = []
        self.names: list[str] = []

    def add(self, rule: Rule, fitted: Fitted, changed: torch.Tensor | None) -> int:
        """Adds the entry of a parameter with its record of changes; returns its row."""
        member, history = fitted.member, fitted.history
        row = self.positions.setdefault((member.at, history), len(self.rows))
        if row == len(self.rows):
            self.rows.append((member.group, history))
            self.names.append(member.name)
        self.owners.append(member.param)
        self.entries.append(_make_entry(rule, fitted, row, changed))
        return row


def lay_out(
    request: PlanRequest,
    fitted: list[Fitted],
    chosen: dict[torch.device, backends.Backend],
) -> PlanLayout:
    """Arranges parameters by device and process groups.

    Args:
        request: the inputs of the plan.
        fitted: the members with their states.
        chosen: the backend of each device.

    Raises:
        ValueError: two tensors that the step writes share memory.
    """
    listed: dict[_Place, _Listed] = {}
    found: list[tuple[_Place, int]] = []
    for one in fitted:
        place = _Place(one.view.local.device, one.view.groups)
        changed = None
        if request.record is not None:
            changed = request.record.bits(one.member.param, one.view)
        row = listed.setdefault(place, _Listed()).add(request.rule, one, changed)
        found.append((place, row))
    for some in listed.values():
        check_distinct(
            (tensor, f"parameter {entry.param_id}")
            for entry in some.entries
            for tensor in (entry.param, *entry.written())
        )
    tables = {
        place: make_table(request.rule, some.rows, place.device, request.measured, some.names)
        for place, some in listed.items()
    }
    make_part = request.features.make_part
    parts = [
        make_part(
            chosen[place.device],
            some.entries,
            tables[place],
            some.owners,
            place.groups is not None,
        )
        for place, some in listed.items()
    ]
    rows = [tables[place].rows[row] for place, row in found]
    return PlanLayout(parts, [place.groups or () for place in listed], rows)


def _make_entry(
    rule: Rule, fitted: Fitted, row: int, changed: torch.Tensor | None
) -> backends.Entry:
    """The entry of a parameter for backends, without the states of disabled options."""
    group, held, param = fitted.member.group, fitted.tensors, fitted.view.local
    rule = rule.of(group)
    form = STATE_FORMATS[option(group, "states")]
    weight = WEIGHT_FORMATS[option(group, "weights")]
    flags = rule.flag_bits(group)
    slots = rule.state_slots(flags)
    scaled = [(i, name) for i, name in slots if rule.format_of(name, form).scale is not None]
    return backends.Entry(
        param=param,
        states={slot: held[name] for slot, name in slots},
        scales={slot: held[scale_key(name)] for slot, name in scaled},
        format=form,
        weight=weight.codes[param.dtype],
        companion=held.get(weight.key),
        ema=held.get(EMA),
        changed=changed,
        rule=rule,
        flags=flags,
        row=row,
        param_id=fitted.member.number,
        first=fitted.view.start(form),
    )
