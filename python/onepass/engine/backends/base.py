"""What a backend is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...formats import ABSENT, StateFormat
from ...numerics.verdict import SKIPPED, VERDICT_WIDTH, judge
from ...rules import CODES, MAX_STATES, RULES, Rule
from ..hyper_table import RowTable


@dataclass(frozen=True)
class Entry:
    """One parameter of a plan, with what a sweep needs to know of it.

    Attributes:
        param: the parameter's tensor, dense and non-overlapping; updated in place.
        states: the codes of its states by slot, in the parameter's order in memory; updated in
            place.
        format: of all its states.
        weight: number of the parameter's format.
        draws: whether any of its formats draws random bits.
        rule, flags: the variant of the algorithm.
        row: of the hyperparameter table.
        param_id: position of the parameter in the optimizer, which keys its random bits.
        first: index of its first element in the whole parameter, likewise.
        scales: of the states by slot, where the format has them; updated in place.
        companion: of the weight, where its format has one; updated in place.
        ema: fp32 average of the weight, in its order in memory, if it has one; updated in place.
    """

    param: torch.Tensor
    states: dict[int, torch.Tensor]
    format: StateFormat
    weight: int
    rule: Rule
    flags: int
    row: int
    param_id: int
    draws: bool = True
    first: int = 0
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    companion: torch.Tensor | None = None
    ema: torch.Tensor | None = None

    def spec(self) -> list[int]:
        """The entry's row of the spec that compiled backends read (csrc/plan.h)."""
        codes = [self.format.code if slot in self.states else ABSENT for slot in range(MAX_STATES)]
        named = [CODES[self.rule.name], self.flags, self.row, self.param_id, self.first]
        return [*named, self.weight, int(self.ema is not None), *codes]

    def held(self) -> list[torch.Tensor]:
        """Its tensors as compiled backends take them: of each slot codes and scales, companion, the
        average."""
        tensors = []
        for slot in sorted(self.states):
            tensors.append(self.states[slot])
            if slot in self.scales:
                tensors.append(self.scales[slot])
        return [*tensors, *(t for t in (self.companion, self.ema) if t is not None)]


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape and their elements the same order in memory.

    Not so if torch negates one of them as it reads it, as the imaginary part of a conjugate.
    """
    if a.shape != b.shape or a.is_neg() != b.is_neg():
        return False
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(s == t for s, t, n in strides if n > 1)


@dataclass(frozen=True)
class StepSwitches:
    """The booleans of a step: a bit each in StepSwitch of csrc/entry.h, a constexpr in Triton.

    Attributes:
        zero_grads: set the gradients to zero, those of rows left alone as well.
    """

    zero_grads: bool = False

    @property
    def bits(self) -> int:
        """All of them, the first in bit 0."""
        return int(self.zero_grads)


NO_SWITCHES = StepSwitches()


@dataclass(frozen=True)
class StepArgs:
    """What a step is run with, beside the plan: the same struct in csrc/entry.h.

    Attributes:
        hyper: fp32 [rows, HYPER_WIDTH], on the device.
        counters: int64 [rows, 2], on the device: seed and number of the step. A row whose number is
            0 is left alone, bit for bit.
        telemetry: float64 [rows, TELEMETRY_WIDTH] to fill, of rows left alone too, with no update;
            None for none.
        switches: see :class:`StepSwitches`.
    """

    hyper: torch.Tensor
    counters: torch.Tensor
    telemetry: torch.Tensor | None = None
    switches: StepSwitches = NO_SWITCHES


@dataclass(frozen=True)
class Policy:
    """What may come between a gradient and the rule.

    Attributes:
        max_norm: gradients are clipped to this global norm; None for no clipping.
        largest: that norm is the largest magnitude, else the root of the sum of squares.
        skip_nonfinite: leave everything as it is when a gradient is not finite.
    """

    max_norm: float | None = None
    largest: bool = False
    skip_nonfinite: bool = False

    @property
    def measures(self) -> bool:
        """Whether it asks for a norm pass."""
        return self.max_norm is not None or self.skip_nonfinite


class Backend(ABC):
    """Runs a step over the entries of one device.

    Attributes:
        name: what users ask for.
        rules: names of the rules it has.
        extras: whether it averages weights and measures telemetry in the sweep.
        launches: whether :meth:`run` is one launch: if it raises, the step has changed nothing but
            what :meth:`advance` has, which :meth:`retreat` undoes.
    """

    name: ClassVar[str]
    rules: ClassVar[Collection[str]] = frozenset(RULES)
    extras: ClassVar[bool] = True
    launches: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self, device: torch.device | None) -> str:
        """Why this backend cannot serve the device (None: any at all); empty when it can."""

    @abstractmethod
    def prepare(self, entries: Sequence[Entry]) -> Any:
        """Flattens the entries once; what it returns goes into the two calls below."""

    @abstractmethod
    def refresh(self, prepared: Any, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Takes the gradients of a step; False, with nothing changed, if the plan is stale.

        Args:
            prepared: of :meth:`prepare`.
            params, grads: plain tensors in the order of entries, parameters as they are now. The
                caller keeps them alive until :meth:`run` is done.
        """

    @abstractmethod
    def run(self, prepared: Any, step: StepArgs) -> None:
        """The sweep over the gradients that refresh has taken.

        Args:
            prepared: of :meth:`prepare`.
            step: what it is run with.
        """

    @abstractmethod
    def norm(self, prepared: Any) -> torch.Tensor:
        """What a global norm is made of, over the gradients that refresh has taken.

        Returns:
            float64 [3] on the device: the sum of squares (infinite or NaN where an element is), the
            largest magnitude (NaN passed over), and how many elements are not finite. The same
            run after run; squares neither overflow nor vanish. Nothing is changed, and the plan
            stays ready for run.
        """

    # What the host does with numbers that it can read. Backends whose numbers are on a GPU have
    # kernels for both.

    def judge(
        self,
        verdict: torch.Tensor,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: Policy,
    ) -> None:
        """Fills verdict, float64 [VERDICT_WIDTH], which has the count of steps skipped so far.

        Args:
            verdict: see :func:`onepass.numerics.verdict.judge`.
            found: of :meth:`norm`, over all devices; None where nothing was measured.
            grad_scale, found_inf: fp32 0-dim, on the device, or None: torch.amp.GradScaler's.
            policy: what is asked for.
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
        """What :meth:`advance` needs that can fail: nothing is changed yet.

        Raises:
            ValueError: a step counter that is not a count.
        """
        return table.stage(verdict)

    def advance(self, table: RowTable, verdict: torch.Tensor | None, staged: Any) -> None:
        """Writes hyper and counters of the step, as a verdict, if there is one, says.

        Backends whose counters are on a GPU count the step here, others in :meth:`count`.
        """
        table.write(staged)

    def count(self, table: RowTable, staged: Any) -> None:
        """Counts the step, after its sweep."""
        table.count(staged)

    def retreat(self, table: RowTable, before: torch.Tensor) -> None:
        """Undoes an :meth:`advance` whose sweep was not launched.

        The steps go back by one in the rows whose counters[:, 1] is not 0, which are those that
        advance has counted. The host does not wait for the device. hyper and counters keep the
        values of the step that failed; the next advance derives them anew.

        Args:
            table: as advance has left it; table.kept is changed in place.
            before: a copy of table.kept[1:] from before the advance.
        """
        number = table.counters[:, 1]
        # From the number, since fp32 counters stay at 2^24 when 1 is added.
        steps = (number - 1).to(torch.float32)
        table.steps.copy_(torch.where(number != 0, steps, table.steps))
        table.kept[1:].copy_(before)
