"""The interface of backends and the arguments of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from ...formats import ABSENT, StateFormat
from ...numerics.verdict import SKIPPED, VERDICT_WIDTH, judge
from ...rules import CODES, MAX_STATES, Rule
from ..hyper_table import RowTable

WORD = 32
"""Elements per word of a record of changed weights."""


@dataclass(frozen=True)
class Entry:
    """One parameter of a plan with its state tensors and the variant of the algorithm.

    Attributes:
        param: the parameter's tensor, dense and non-overlapping; updated in place.
        states: slot -> codes of the state, in the parameter's memory order; updated in place.
        format: the format of the states; see :meth:`format_of`.
        weight: code number of the weight format.
        rule, flags: the variant of the algorithm.
        row: index of the entry's row in the hyperparameter table.
        param_id: the parameter's number, which keys its random bits.
        first: index of the entry's first element in the whole parameter, which also keys random
            bits.
        scales: slot -> scales of the state, if the format has blocks; updated in place.
        companion: the companion of the weight, or None; updated in place.
        ema: fp32 average of the weight in the parameter's memory order, or None; updated in place.
        changed: record of changed weights, int32, one bit per element in the parameter's memory
            order, or None. A step sets bit ``i % 32`` of word ``i // 32`` if it changes the stored
            bits of element i of ``param``, and clears no bit. The companion does not count.
    """

    param: torch.Tensor
    states: dict[int, torch.Tensor]
    format: StateFormat
    weight: int
    rule: Rule
    flags: int
    row: int
    param_id: int
    first: int = 0
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    companion: torch.Tensor | None = None
    ema: torch.Tensor | None = None
    changed: torch.Tensor | None = None

    def format_of(self, slot: int) -> StateFormat:
        """The format of a state."""
        return self.format.of(self.rule.kinds[slot])

    @property
    def format_codes(self) -> tuple[int, ...]:
        """The number of the format of each slot; ABSENT for a slot without a state."""
        return tuple(
            self.format_of(slot).code if slot in self.states else ABSENT
            for slot in range(MAX_STATES)
        )

    def spec(self) -> list[int]:
        """The entry's row of the ``spec`` tensor that compiled backends read (csrc/plan.h)."""
        codes = self.format_codes
        named = [CODES[self.rule.name], self.flags, self.row, self.param_id, self.first]
        extras = int(self.ema is not None) | int(self.changed is not None) << 1
        return [*named, self.weight, extras, *codes]

    def held(self) -> list[torch.Tensor]:
        """The state tensors: codes and scales of each slot, companion, average."""
        tensors = []
        for slot in sorted(self.states):
            tensors.append(self.states[slot])
            if slot in self.scales:
                tensors.append(self.scales[slot])
        return [*tensors, *(t for t in (self.companion, self.ema) if t is not None)]

    def written(self) -> list[torch.Tensor]:
        """All tensors that a step writes besides the parameter and its gradient, in the order that
        compiled backends expect: :meth:`held` and the record of changes."""
        return self.held() if self.changed is None else [*self.held(), self.changed]


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, memory order and negative bit.

    The negative bit marks a tensor that torch negates on every read, such as the imaginary part of
    a conjugate.
    """
    if a.shape != b.shape or a.is_neg() != b.is_neg():
        return False
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(s == t for s, t, n in strides if n > 1)


class StepSwitches(NamedTuple):
    """The booleans of a step: each is a bit of StepSwitch in csrc/entry.h and a Triton constexpr.

    Attributes:
        zero_grads: set the gradients to zero, including those of skipped rows.
    """

    zero_grads: bool = False

    @property
    def bits(self) -> int:
        """The booleans as a bit mask; the first attribute is bit 0."""
        return int(self.zero_grads)


NO_SWITCHES = StepSwitches()


class StepArgs(NamedTuple):
    """The arguments of a step besides the plan; csrc/entry.h has the same struct.

    Attributes:
        hyper: fp32 [rows, HYPER_WIDTH], on the device.
        counters: int64 [rows, 2], on the device: seed and number of the step. A row whose number is
            0 is skipped: its parameters and states keep their bits.
        telemetry: float64 [rows, TELEMETRY_WIDTH], filled by the step; the update of a skipped row
            is 0. None if telemetry is off.
        switches: see :class:`StepSwitches`.
    """

    hyper: torch.Tensor
    counters: torch.Tensor
    telemetry: torch.Tensor | None = None
    switches: StepSwitches = NO_SWITCHES


@dataclass(frozen=True)
class Policy:
    """The clipping and skipping options of a step.

    Attributes:
        max_norm: gradients are clipped to this global norm; None for no clipping.
        largest: whether the norm is the largest magnitude instead of the 2-norm.
        skip_nonfinite: whether a step with a non-finite gradient is skipped.
    """

    max_norm: float | None = None
    largest: bool = False
    skip_nonfinite: bool = False

    @property
    def measures(self) -> bool:
        """Whether the options need a norm pass over the gradients."""
        return self.max_norm is not None or self.skip_nonfinite


class Backend(ABC):
    """Runs a step over the entries of one device.

    Attributes:
        name: value of the ``backend`` keyword.
        mixes_rules: whether the entries of one :meth:`prepare` may have different rules.
        launches: whether :meth:`run` changes the entries in a single launch. If :meth:`run` raises,
            only the changes of :meth:`advance` remain, and :meth:`retreat` undoes them.
    """

    name: ClassVar[str]
    mixes_rules: ClassVar[bool] = True
    launches: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self, device: torch.device | None) -> str:
        """The reason why this backend cannot serve the device (None: any); empty if it can."""

    def lacks(self, rule: Rule) -> str:
        """The reason why this backend cannot run a rule; empty if it can."""
        return ""

    @abstractmethod
    def prepare(self, entries: Sequence[Entry]) -> Any:
        """Flattens the entries once; the result is an argument of refresh, run and norm."""

    @abstractmethod
    def refresh(self, prepared: Any, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Stores the gradients of a step; returns False and changes nothing if the plan is stale.

        Args:
            prepared: the result of :meth:`prepare`.
            params, grads: the current plain tensors in the order of entries. The caller keeps them
                alive until :meth:`run` returns.
        """

    @abstractmethod
    def run(self, prepared: Any, step: StepArgs) -> None:
        """Runs the sweep over the gradients from :meth:`refresh`.

        Args:
            prepared: the result of :meth:`prepare`.
            step: the arguments of the step.
        """

    @abstractmethod
    def norm(self, prepared: Any) -> torch.Tensor:
        """Measures the gradients from :meth:`refresh` for a global norm.

        The result is deterministic, and squares neither overflow nor underflow. Nothing is changed,
        and :meth:`run` may follow.

        Returns:
            float64 [3] on the device: the sum of squares (infinite or NaN if an element is), the
            largest magnitude (ignoring NaN), and the number of non-finite elements.
        """

    # The default methods below compute on the host. Backends with tables on a GPU override them
    # with kernels.

    def judge(
        self,
        verdict: torch.Tensor,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: Policy,
    ) -> None:
        """Computes the verdict of a step: its norm, its gradient factor and whether it is skipped.

        Args:
            verdict: float64 [VERDICT_WIDTH], see :func:`onepass.numerics.verdict.judge`; updated in
                place. On entry it contains the number of steps skipped so far.
            found: the result of :meth:`norm` over all devices; None without a norm pass.
            grad_scale, found_inf: the fp32 0-dim tensors of torch.amp.GradScaler on the device, or
                None.
            policy: the clipping and skipping options.
        """
        numbers = judge(
            None if found is None else found.tolist(),
            None if grad_scale is None else float(grad_scale),
            None if found_inf is None else float(found_inf),
            policy.max_norm,
            policy.largest,
            policy.skip_nonfinite,
            float(verdict[SKIPPED]),
        )
        assert len(numbers) == VERDICT_WIDTH
        verdict.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))

    def stage(self, table: RowTable, verdict: torch.Tensor | None) -> Any:
        """Computes the input of :meth:`advance` that can raise; nothing is changed.

        Raises:
            ValueError: a step counter is not a whole number in [0, 2^53).
        """
        return table.stage(verdict)

    def advance(self, table: RowTable, verdict: torch.Tensor | None, staged: Any) -> None:
        """Writes the hyperparameters and random keys of the step into the table.

        Backends with counters on a GPU also advance the counters here; other backends advance them
        in :meth:`count`.

        Args:
            table: the hyperparameter table; changed in place.
            verdict: the verdict of the step, or None.
            staged: the result of :meth:`stage`.
        """
        table.write(staged)

    def count(self, table: RowTable, staged: Any) -> None:
        """Advances the counters after the sweep."""
        table.count(staged)

    def retreat(self, table: RowTable, before: torch.Tensor) -> None:
        """Undoes an :meth:`advance` whose sweep was not launched.

        The step counters decrease by one in the rows that advance counted, which are the rows with
        a nonzero counters[:, 1]. The call is asynchronous. hyper and counters keep the values of
        the failed step; the next advance overwrites them.

        Args:
            table: the table after advance; table.kept is changed in place.
            before: a copy of table.kept[1:] from before the advance.
        """
        number = table.counters[:, 1]
        # Use the int64 number, because an fp32 counter stays at 2^24 if 1 is added.
        steps = (number - 1).to(torch.float32)
        table.steps.copy_(torch.where(number != 0, steps, table.steps))
        table.kept[1:].copy_(before)
