"""The hyperparameter table of one device whose groups are stepped by different rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..rules import Rule
from .hyper_table import TELEMETRY_WIDTH, History, RowTable, step_tensors


class JointTable:
    """One :class:`RowTable` for each rule, in shared tensors that one launch reads.

    Args:
        rule: a rule whose :meth:`Rule.of` selects the rule of each group.
        rows, device, measured, names: as for :class:`RowTable`.

    Attributes:
        parts: the table of each rule.
        rows: the rows of all tables, in the order of the argument.
        positions: for each of these rows, its position in hyper and counters.
        spans: rule -> the positions of its rows, which are contiguous.
        hyper, counters: as for :class:`RowTable`, of all tables.
        steps: fp32 step counters of the first table.
        telemetry: as for :class:`RowTable`, in the order of rows.
    """

    def __init__(
        self,
        rule: Rule,
        rows: list[tuple[dict[str, Any], History]],
        device: torch.device,
        measured: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        chosen: dict[Rule, list[int]] = {}
        for i, (group, _) in enumerate(rows):
            chosen.setdefault(rule.of(group), []).append(i)
        self.hyper, self.counters = step_tensors(len(rows), device)
        self.positions = [0] * len(rows)
        self.spans: dict[Rule, slice] = {}
        parts, begin, found = [], 0, {}
        for one, numbers in chosen.items():
            span = self.spans[one] = slice(begin, begin + len(numbers))
            table = RowTable(
                one,
                [rows[i] for i in numbers],
                device,
                names=[names[i] if names else f"row {i}" for i in numbers],
                memory=(self.hyper[span], self.counters[span]),
            )
            parts.append(table)
            for i, row in zip(numbers, table.rows, strict=True):
                self.positions[i], found[i] = begin, row
                begin += 1
        self.parts = tuple(parts)
        self.rows = [found[i] for i in range(len(rows))]
        self.steps = self.parts[0].steps
        self.telemetry: torch.Tensor | None = None
        if measured:
            self.telemetry = torch.zeros(
                len(rows), TELEMETRY_WIDTH, dtype=torch.float64, device=device
            )


def make_table(
    rule: Rule,
    rows: list[tuple[dict[str, Any], History]],
    device: torch.device,
    measured: bool,
    names: Sequence[str],
) -> RowTable | JointTable:
    """The hyperparameter table of one device; see :class:`RowTable` for the arguments."""
    if all(rule.of(group) is rule for group, _ in rows):
        return RowTable(rule, rows, device, measured, names)
    return JointTable(rule, rows, device, measured, names)
