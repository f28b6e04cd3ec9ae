"""What a backend is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..formats import ABSENT, StateFormat
from ..rules import RULES, SLOTS, Rule


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

    def spec(self) -> list[int]:
        """The entry's row of the spec that compiled backends read (csrc/plan.h)."""
        codes = [self.format.code if slot in self.states else ABSENT for slot in range(SLOTS)]
        named = [self.rule.code, self.flags, self.row, self.param_id, self.first]
        return [*named, self.weight, *codes]

    def held(self) -> list[torch.Tensor]:
        """Its tensors as compiled backends take them: of each slot codes and scales, companion."""
        tensors = []
        for slot in sorted(self.states):
            tensors.append(self.states[slot])
            if slot in self.scales:
                tensors.append(self.scales[slot])
        return tensors if self.companion is None else [*tensors, self.companion]


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape and their elements the same order in memory."""
    return a.shape == b.shape and all(
        s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1
    )


class Backend(ABC):
    """Runs a step over the entries of one device.

    Attributes:
        name: what users ask for.
        rules: names of the rules it has.
        chunk: how many gradients refresh takes at a time; None takes all at once.
    """

    name: ClassVar[str]
    rules: ClassVar[Collection[str]] = frozenset(RULES)
    chunk: ClassVar[int | None] = None

    @abstractmethod
    def unavailable(self, device: torch.device | None) -> str:
        """Why this backend cannot serve the device (None: any at all); empty when it can."""

    @abstractmethod
    def prepare(self, entries: Sequence[Entry]) -> Any:
        """Flattens the entries once; what it returns goes into the two calls below."""

    @abstractmethod
    def refresh(self, prepared: Any, grads: list[torch.Tensor], first: int) -> bool:
        """Takes gradients of a step, those of entry first and its successors, in order.

        False, with nothing changed, when the plan is stale.
        """

    @abstractmethod
    def run(self, prepared: Any, hyper: torch.Tensor, counters: torch.Tensor) -> None:
        """The step. hyper: fp32 [rows, HYPER_WIDTH]; counters: int64 [rows, 2], seed and step."""

    @abstractmethod
    def norm(self, prepared: Any) -> torch.Tensor:
        """What a global norm is made of, over the gradients that refresh has taken.

        Returns:
            float64 [3] on the device: the sum of squares (infinite or NaN where an element is), the
            largest magnitude (NaN passed over), and how many elements are not finite. The same
            run after run; squares neither overflow nor vanish. Nothing is changed, and the plan
            stays ready for run.
        """
