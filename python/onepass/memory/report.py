"""What a training run holds, by category, predicted and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .sizes import show

TOLERANCE = 0.005
"""Predictions of our own optimizers are within this of what is measured, relatively."""


@dataclass(frozen=True)
class Bytes:
    """Bytes by category; all of one device but ``host``.

    Attributes:
        weights: parameters, frozen ones too.
        gradients: of every parameter that is trained.
        moments: states of the rule, with their scales and counters of steps.
        companions: what weights in 16 bits keep beside them: master copies, split bits, Kahan's
            compensation.
        ema: averages of the weights.
        ring: buffers on the device through which paged states stream.
        temporary: what a step needs at most beyond all that, and has freed when it ends.
        host: states that rest in host memory; no part of held or peak.
    """

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    companions: int = 0
    ema: int = 0
    ring: int = 0
    temporary: int = 0
    host: int = 0

    @property
    def states(self) -> int:
        """What the optimizer keeps, wherever it rests."""
        return self.moments + self.companions + self.ema + self.host

    @property
    def held(self) -> int:
        """What is on the device between two steps, gradients included."""
        return sum(getattr(self, name) for name in HELD)

    @property
    def peak(self) -> int:
        """What is on the device in the step, at most."""
        return self.held + self.temporary

    def items(self) -> Iterator[tuple[str, int]]:
        """(category, bytes)."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(**{name: n + getattr(other, name) for name, n in self.items()})


HELD = ("weights", "gradients", "moments", "companions", "ema", "ring")
CATEGORIES = (*HELD, "temporary")
"""The parts of :attr:`Bytes.peak`, in the order in which they are shown."""

TITLES = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "companions": "master or split bits",
    "ema": "average of weights",
    "ring": "paging ring",
    "temporary": "temporary in the step",
    "host": "on the host",
}


@dataclass
class MemoryReport:
    """One optimizer over one parameter list.

    Attributes:
        name: of the optimizer.
        parameters: elements of all parameters, frozen ones too.
        device: type of the device that the bytes are of.
        predicted: None where nothing predicts this optimizer; see problem.
        measured: None unless it was asked for and could be.
        process_peak: bytes by which the resident set of the process grew in a step at most: any
            allocator's, to within about half a MiB. Measured on Linux CPUs only.
        ours: whether it is an optimizer of onepass.
        problem: why something is missing.
        notes: what else is to be said of the figures.
    """

    name: str
    parameters: int
    device: str = "cpu"
    predicted: Bytes | None = None
    measured: Bytes | None = None
    process_peak: int | None = None
    ours: bool = False
    problem: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> Bytes | None:
        """The measured bytes where there are any, else the predicted ones."""
        return self.measured or self.predicted

    def difference(self, category: str = "peak") -> float | None:
        """(measured - predicted) / predicted, of a category, ``states``, ``held`` or ``peak``.

        None where one of the two is missing; infinite where nothing was predicted and something is
        there.
        """
        if self.predicted is None or self.measured is None:
            return None
        expected, found = getattr(self.predicted, category), getattr(self.measured, category)
        if not expected:
            return float("inf") if found else 0.0
        return (found - expected) / expected

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; bytes as integers."""
        found: dict[str, Any] = {
            "name": self.name,
            "parameters": self.parameters,
            "device": self.device,
            "onepass": self.ours,
        }
        for which in ("predicted", "measured"):
            value = getattr(self, which)
            found[which] = value and {**asdict(value), "held": value.held, "peak": value.peak}
        difference = self.difference()
        finite = difference is not None and abs(difference) != float("inf")
        found["difference"] = difference if finite else None
        found["process_peak"] = self.process_peak
        found["problem"], found["notes"] = self.problem or None, list(self.notes)
        return found

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.parameters:,} parameters on {self.device}"]
        pairs = [(w, b) for w in ("predicted", "measured") if (b := getattr(self, w)) is not None]
        for category in (*CATEGORIES, "host"):
            if any(getattr(b, category) for _, b in pairs):
                found = ", ".join(f"{w} {show(getattr(b, category))}" for w, b in pairs)
                lines.append(f"  {TITLES[category]:<22} {found}")
        if pairs:
            peak = ", ".join(f"{w} {show(b.peak)}" for w, b in pairs)
            lines.append(f"  {'peak of the step':<22} {peak}")
        return "\n".join([*lines, *(f"  {note}" for note in [self.problem, *self.notes] if note)])
