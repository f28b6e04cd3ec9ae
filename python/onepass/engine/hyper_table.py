"""The hyperparameter table of one device.

A row serves the parameters of one group that took the same steps. The table stores the options as
float64 and the step counters. Each step derives the fp32 hyperparameters and the keys of the random
bits from them. Counters on a GPU are advanced by a kernel, so the host never reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..numerics.verdict import FACTOR, SKIP
from ..rules import HYPER_WIDTH, LR, OPTIONS_WIDTH, Rule, StepOf
from ..rules.group_options import option

GRAD, WEIGHT, UPDATE, NONFINITE = range(4)
TELEMETRY_WIDTH = 4
"""The columns of telemetry: the sums of squares of the gradients before unscaling and clipping, of
the weights after the step and of the updates, and the number of infinite or NaN gradients."""


def step_number(step: float, which: str) -> int:
    """The number of the next step, counted from 1.

    Args:
        step: the steps taken so far, from a counter.
        which: name of the parameters, for error messages.

    Raises:
        ValueError: the counter is not a whole number in [0, 2^53).
    """
    if not 0 <= step < 1 << 53 or step != int(step):
        raise ValueError(f"state['step'] of {which} must be a whole number >= 0; got {step}")
    return int(step) + 1


class Row:
    """A row: the parameters of one group on one device that took the same steps.

    Attributes:
        group: the parameter group.
        which: name of the first parameter, for error messages.
        step: fp32 step counter. All parameters of the row share this tensor as state["step"].
        fresh: fp32, 1 before the first step with the states of the row, else 0.
        scalar_states: key -> fp32 scalar state, also shared by all parameters of the row.
    """

    __slots__ = ("fresh", "group", "scalar_states", "step", "which")

    def __init__(
        self,
        group: dict[str, Any],
        which: str,
        step: torch.Tensor,
        fresh: torch.Tensor,
        scalar_states: dict[str, torch.Tensor],
    ) -> None:
        self.group, self.which, self.step, self.fresh = group, which, step, fresh
        self.scalar_states = scalar_states


class History(NamedTuple):
    """The counters of a parameter; parameters of one group with equal counters share a row.

    Attributes:
        steps: number of steps taken.
        fresh: whether no step has been taken with the states.
        scalar_states: values of the rule's scalar states, in the rule's order.
    """

    steps: float
    fresh: bool
    scalar_states: tuple[float, ...] = ()


class Staged(NamedTuple):
    """Values for the next step, computed on the host but not yet written into the table.

    Attributes:
        hyper, counters: see :class:`RowTable`.
        kept: the value of ``RowTable.kept`` after the step.
    """

    hyper: npt.NDArray[np.float32]
    counters: npt.NDArray[np.int64]
    kept: npt.NDArray[np.float32]


def step_tensors(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The zeroed hyper and counters of a table with this number of rows: see :class:`RowTable`."""
    hyper = torch.zeros(count, HYPER_WIDTH, dtype=torch.float32, device=device)
    return hyper, torch.zeros(count, 2, dtype=torch.int64, device=device)


class RowTable:
    """All rows of one device.

    Args:
        rule: the rule of the optimizer.
        rows: the group and the counters of each row.
        device: device of the table.
        measured: whether to allocate telemetry.
        names: name of each row's first parameter, for error messages.
        memory: the zeroed tensors to use as hyper and counters; None to allocate them.

    Attributes:
        rule: as given.
        rows: see :class:`Row`; the tensors of a row are views of kept.
        options: float64 [rows, OPTIONS_WIDTH].
        kept: fp32 [2 + scalar states, rows]: steps, fresh, then the rule's scalar states.
        steps, fresh: fp32 [rows], views of kept.
        scalar_states: fp32 [scalar states, rows], a view of kept.
        history: fp32 [1 + scalar states, rows], kept without steps. A view made once, because a
            slice takes longer than the rest of the bookkeeping of a step.
        hyper: fp32 [rows, HYPER_WIDTH], hyperparameters of the next step.
        counters: int64 [rows, 2], seed and number of the next step, counted from 1; the number is 0
            if the step is skipped.
        telemetry: float64 [rows, TELEMETRY_WIDTH]; None if telemetry is off.
    """

    def __init__(
        self,
        rule: Rule,
        rows: list[tuple[dict[str, Any], History]],
        device: torch.device,
        measured: bool = False,
        names: Sequence[str] = (),
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.rule = rule
        count = len(rows)
        # optimizer.state keeps the counters after the table is freed: store them in one tensor.
        columns = [(h.steps, float(h.fresh), *h.scalar_states) for _, h in rows]
        width = 2 + len(rule.scalar_states)
        self.kept = torch.tensor(columns, dtype=torch.float32, device=device)
        self.kept = self.kept.reshape(count, width).t().contiguous()
        self.steps, self.fresh, self.scalar_states = self.kept[0], self.kept[1], self.kept[2:]
        self.history = self.kept[1:]
        self.rows = [
            Row(
                group,
                names[i] if names else f"row {i}",
                self.steps[i],
                self.fresh[i],
                {s.key: self.scalar_states[k, i] for k, s in enumerate(rule.scalar_states)},
            )
            for i, (group, _) in enumerate(rows)
        ]
        self.options = torch.zeros(count, OPTIONS_WIDTH, dtype=torch.float64, device=device)
        self.hyper, self.counters = memory or step_tensors(count, device)
        self.telemetry: torch.Tensor | None = None
        if measured:
            self.telemetry = torch.zeros(count, TELEMETRY_WIDTH, dtype=torch.float64, device=device)
        # NumPy views for tables on the CPU: a small torch operation costs about 1 microsecond.
        self._host = (
            [t.numpy() for t in (self.kept, self.hyper, self.counters)]
            if device.type == "cpu"
            else None
        )
        self._options: list[tuple[float, ...]] = []
        self._seeds: list[int] = []
        self._captured: list[torch.Tensor] = []

    @property
    def parts(self) -> tuple[RowTable, ...]:
        """The tables with one rule each: this one."""
        return (self,)

    def stage(self, verdict: torch.Tensor | None) -> Staged:
        """Computes the values of the next step on the host; the table is not changed.

        Args:
            verdict: see :mod:`onepass.numerics.verdict`; None if the step has no verdict. A skipped
                step advances no counter.

        Raises:
            ValueError: a step counter is not a whole number in [0, 2^53).
        """
        factor, skip = 1.0, False
        if verdict is not None:
            judged = verdict.tolist()
            factor, skip = judged[FACTOR], bool(judged[SKIP])
        if self._host is not None:
            kept, hyper, counters = (array.copy() for array in self._host)
        else:
            kept, hyper, counters = (
                t.cpu().numpy() for t in (self.kept, self.hyper, self.counters)
            )
        rule = self.rule
        # Values below fp32's range are rounded, even if NumPy is set to raise on underflow.
        with np.errstate(all="ignore"):
            for i, (row, history) in enumerate(zip(self.rows, kept.T.tolist(), strict=True)):
                step, first, *scalar_states = history
                number = step_number(step, row.which)
                if skip:
                    counters[i, 1] = 0
                    continue
                options = rule.options_row(row.group)
                advanced: tuple[float, ...] = ()
                if scalar_states:
                    advanced = rule.advance(options, number, tuple(scalar_states))
                hyper[i] = rule.hyper(options, StepOf(number, bool(first), advanced), factor)
                counters[i] = int(option(row.group, "seed")), number
                kept[0, i], kept[1, i] = number, 0
                if advanced:
                    kept[2:, i] = advanced
        return Staged(hyper, counters, kept)

    def write(self, staged: Staged) -> None:
        """Copies the staged hyperparameters and random keys into the table, before the sweep."""
        if self._host is not None:
            _, hyper, counters = self._host
            hyper[:], counters[:] = staged.hyper, staged.counters
        else:
            self.hyper.copy_(torch.from_numpy(staged.hyper))
            self.counters.copy_(torch.from_numpy(staged.counters))

    def count(self, staged: Staged) -> None:
        """Copies the staged counters into the table, after the sweep."""
        if self._host is not None:
            self._host[0][:] = staged.kept
        else:
            self.kept.copy_(torch.from_numpy(staged.kept))

    def upload(self) -> None:
        """Copies changed options and seeds to the device, asynchronously.

        A learning rate that is a GPU tensor is copied on the GPU at every step. A captured graph
        includes this copy, so a replay uses the tensor's current value.
        """
        groups = [row.group for row in self.rows]
        options = [self.rule.options_row(_known_to_host(group)) for group in groups]
        seeds = [int(option(group, "seed")) for group in groups]
        # Replays of a captured graph overwrite the table, so the host's cached values may be stale.
        if options != self._options or self._captured:
            self._copy(self.options, torch.tensor(options, dtype=torch.float64, device="cpu"))
            self._options = options
        if seeds != self._seeds or self._captured:
            self._copy(self.counters[:, 0], torch.tensor(seeds, dtype=torch.int64, device="cpu"))
            self._seeds = seeds
        for i, group in enumerate(groups):
            if on_gpu(group["lr"]):
                self.options[i, LR].copy_(group["lr"].reshape(()), non_blocking=True)

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies a host tensor into the table, asynchronously to a GPU."""
        if destination.is_cuda:
            source = source.pin_memory()
            if capturing():
                # Every replay reads the pinned source again: keep it alive.
                self._captured.append(source)
        destination.copy_(source, non_blocking=True)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def on_gpu(value: Any) -> bool:
    """Whether an option is a GPU tensor; the host must synchronise to read it."""
    return isinstance(value, torch.Tensor) and value.is_cuda


def _known_to_host(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group, with 0.0 in place of a learning rate on a GPU."""
    return {**group, "lr": 0.0} if on_gpu(group["lr"]) else group


def counter_bytes(rule: Rule) -> int:
    """Bytes of the counters of one row: see :class:`RowTable`."""
    return (2 + len(rule.scalar_states)) * torch.float32.itemsize
