"""The rows of the hyperparameter table, on one device: parameters of a group with the same history.

Options go in, as float64; the step counters are here; hyperparameters come out, as fp32, with what
keys the random bits. Where counters are on a GPU, so is that derivation: the host never reads them.
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
"""Columns of telemetry: sums of squares of gradients as they came, of weights after the step, of
the update; how many gradients are infinite or NaN."""


def step_number(step: float, which: str) -> int:
    """The number of the step after so many.

    Args:
        step: the value of a counter.
        which: parameters that it counts for, for the message of an error.

    Raises:
        ValueError: it is not a count.
    """
    if not 0 <= step < 1 << 53 or step != int(step):
        raise ValueError(f"state['step'] of {which} must be a whole number >= 0; got {step}")
    return int(step) + 1


class Row:
    """A row: the parameters of one group on one device that took the same steps.

    Attributes:
        group: the parameter group.
        which: the first of the parameters, for the message of an error.
        step: their step counter, fp32, one tensor that all of them share as state["step"].
        fresh: fp32, 1 while no step has been taken with their states, else 0.
        scalar_states: key -> their scalar state, fp32, shared likewise.
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
    """What the parameters of a row have behind them.

    Attributes:
        steps: that they took.
        fresh: whether no step has been taken with their states.
        scalar_states: of the rule, in its order.
    """

    steps: float
    fresh: bool
    scalar_states: tuple[float, ...] = ()


class Staged(NamedTuple):
    """What the next step writes into a table, derived on the host.

    Attributes:
        hyper, counters: as in :class:`RowTable`.
        kept: of :class:`RowTable`, after the step.
    """

    hyper: npt.NDArray[np.float32]
    counters: npt.NDArray[np.int64]
    kept: npt.NDArray[np.float32]


class RowTable:
    """All rows of one device.

    Attributes:
        rule: of the optimizer.
        rows: see :class:`Row`; their tensors are views of kept.
        options: float64 [rows, OPTIONS_WIDTH].
        kept: fp32 [2 + scalar states, rows]: steps, fresh, then the rule's scalar states.
        steps, fresh: fp32 [rows], of kept.
        scalar_states: fp32 [scalar states, rows], of kept.
        hyper: fp32 [rows, HYPER_WIDTH], of the step that runs next.
        counters: int64 [rows, 2], seed and number of that step, from 1; 0 for a step that is
            skipped.
        telemetry: float64 [rows, TELEMETRY_WIDTH], or None when it is not asked for.
    """

    def __init__(
        self,
        rule: Rule,
        rows: list[tuple[dict[str, Any], History]],
        device: torch.device,
        measured: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        self.rule = rule
        count = len(rows)
        # Counters outlive the table: one storage for all.
        columns = [(h.steps, float(h.fresh), *h.scalar_states) for _, h in rows]
        width = 2 + len(rule.scalar_states)
        self.kept = torch.tensor(columns, dtype=torch.float32, device=device)
        self.kept = self.kept.reshape(count, width).t().contiguous()
        self.steps, self.fresh, self.scalar_states = self.kept[0], self.kept[1], self.kept[2:]
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
        self.hyper = torch.zeros(count, HYPER_WIDTH, dtype=torch.float32, device=device)
        self.counters = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.telemetry: torch.Tensor | None = None
        if measured:
            self.telemetry = torch.zeros(count, TELEMETRY_WIDTH, dtype=torch.float64, device=device)
        # NumPy views where the host counts: torch needs a microsecond for each small operation.
        self._host = (
            [t.numpy() for t in (self.kept, self.hyper, self.counters)]
            if device.type == "cpu"
            else None
        )
        self._options: list[tuple[float, ...]] = []
        self._seeds: list[int] = []
        self._captured: list[torch.Tensor] = []

    def stage(self, verdict: torch.Tensor | None) -> Staged:
        """Derives the next step's numbers on the host; the table stays as it is.

        Args:
            verdict: see :mod:`onepass.numerics.verdict`; None where nothing was asked. A step that
                is skipped counts nowhere.

        Raises:
            ValueError: a step counter that is not a count.
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
        # Numbers below fp32's range are rounded, whatever NumPy is set to do about them.
        with np.errstate(all="ignore"):
            for i, (row, history) in enumerate(zip(self.rows, kept.T.tolist(), strict=True)):
                step, first, *scalar_states = history
                number = step_number(step, row.which)
                if skip:
                    counters[i, 1] = 0
                    continue
                options = rule.options(row.group)
                advanced = rule.advance(options, number, tuple(scalar_states))
                hyper[i] = rule.hyper(options, StepOf(number, bool(first), advanced), factor)
                counters[i] = int(option(row.group, "seed")), number
                kept[:, i] = (number, 0, *advanced)
        return Staged(hyper, counters, kept)

    def write(self, staged: Staged) -> None:
        """Writes what the sweep reads, from the host."""
        if self._host is not None:
            _, hyper, counters = self._host
            hyper[:], counters[:] = staged.hyper, staged.counters
        else:
            self.hyper.copy_(torch.from_numpy(staged.hyper))
            self.counters.copy_(torch.from_numpy(staged.counters))

    def count(self, staged: Staged) -> None:
        """Counts the step whose sweep is done, from the host."""
        if self._host is not None:
            self._host[0][:] = staged.kept
        else:
            self.kept.copy_(torch.from_numpy(staged.kept))

    def upload(self) -> None:
        """Brings options and seeds to the device, without waiting for it, where they have changed.

        A learning rate that is a tensor on a GPU is copied there, at every step: in a captured
        graph too, so that what is written into it between replays counts.
        """
        groups = [row.group for row in self.rows]
        options = [self.rule.options(_known_to_host(group)) for group in groups]
        seeds = [int(option(group, "seed")) for group in groups]
        # What a captured graph has copied, and will again, is not what the host knows of.
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
        if destination.is_cuda:
            source = source.pin_memory()
            if capturing():
                # Every replay reads it again.
                self._captured.append(source)
        destination.copy_(source, non_blocking=True)


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def on_gpu(value: Any) -> bool:
    """Whether an option is a tensor that the host cannot read without waiting for a GPU."""
    return isinstance(value, torch.Tensor) and value.is_cuda


def _known_to_host(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**group, "lr": 0.0} if on_gpu(group["lr"]) else group


def counter_bytes(rule: Rule) -> int:
    """Bytes of the counters that parameters of the same history share: see :class:`RowTable`."""
    return (2 + len(rule.scalar_states)) * torch.float32.itemsize
