"""Predicted and measured memory of a training run, by category."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .sizes import show

TOLERANCE = 0.005
"""The largest relative difference between the predicted and the measured bytes of onepass's
optimizers."""


@dataclass(frozen=True)
class Bytes:
    """Bytes by category. All categories except ``host`` are on one device.

    Attributes:
        weights: parameters, including frozen ones.
        buffers: buffers of the model, which FSDP2 does not shard.
        gradients: gradients of all trained parameters.
        moments: states of the rule, including block scales and step counters.
        companions: companions of 16-bit weights: master copies, split bits, Kahan compensation.
        ema: averages of the weights.
        ring: the device buffer through which paged states stream.
        gathered: what forward and backward hold beyond the gradients: gathered modules, gradients
            before the reduce-scatter; 0 if the peak is in the step of the optimizer.
        activations: tensors saved for the backward pass, as far as they exceed the gradients that
            replace them; 0 if they are not counted.
        scratch: the directions and the workspace of Muon, which stay allocated between steps.
        temporary: the maximum that a step allocates in addition and frees before it returns.
        host: states stored in host memory; not included in ``held`` or ``peak``.
    """

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    companions: int = 0
    ema: int = 0
    ring: int = 0
    scratch: int = 0
    temporary: int = 0
    host: int = 0
    buffers: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def states(self) -> int:
        """Bytes of all optimizer states, on the device and on the host."""
        return self.moments + self.companions + self.ema + self.host

    @property
    def held(self) -> int:
        """Bytes on the device between two steps, including gradients."""
        return sum(getattr(self, name) for name in HELD)

    @property
    def peak(self) -> int:
        """The maximum number of bytes on the device during a step."""
        return self.held + self.gathered + self.activations + self.temporary

    def items(self) -> Iterator[tuple[str, int]]:
        """Yields (category, bytes)."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(**{name: n + getattr(other, name) for name, n in self.items()})


HELD = ("weights", "buffers", "gradients", "moments", "companions", "ema", "ring", "scratch")
CATEGORIES = (*HELD, "gathered", "activations", "temporary")
"""The parts of :attr:`Bytes.peak`, in the order in which they are shown."""

TITLES = {
    "weights": "weights",
    "buffers": "buffers",
    "gathered": "gathered modules",
    "activations": "activations beyond gradients",
    "gradients": "gradients",
    "moments": "states",
    "companions": "extra bits of weights=...",
    "ema": "average of weights",
    "ring": "paging ring",
    "scratch": "scratch of Muon",
    "temporary": "temporary in the step",
    "host": "on the host",
}


@dataclass
class MemoryReport:
    """The memory of one optimizer over one parameter list.

    Attributes:
        name: the name of the optimizer.
        parameters: the number of elements of all parameters, including frozen ones.
        device: the type of the device.
        predicted: the predicted bytes; None if no prediction is possible (see ``problem``).
        measured: the measured bytes; None if the measurement was not requested or not possible.
        process_peak: the maximum growth in bytes of the process's resident set in a step. It covers
            all allocators, is accurate to about 0.5 MiB, and is measured only on Linux CPUs.
        ours: whether the optimizer is a onepass optimizer.
        by_formula: whether the prediction is a formula for a library that cannot be used here.
        problem: the reason why a prediction or measurement is missing; empty if none is.
        notes: further remarks on the figures.
    """

    name: str
    parameters: int
    device: str = "cpu"
    predicted: Bytes | None = None
    measured: Bytes | None = None
    process_peak: int | None = None
    ours: bool = False
    by_formula: bool = False
    problem: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name with its library, as used in figures; "(predicted)" marks a formula."""
        name = f"onepass {self.name}" if self.ours and ":" not in self.name else self.name
        return f"{name} (predicted)" if self.by_formula else name

    @property
    def bytes(self) -> Bytes | None:
        """The measured bytes if available, else the predicted bytes."""
        return self.measured or self.predicted

    def difference(self, category: str = "peak") -> float | None:
        """(measured - predicted) / predicted for a category, ``states``, ``held`` or ``peak``.

        The result is None if one of the two is missing, and infinite if 0 bytes were predicted and
        more were measured.
        """
        if self.predicted is None or self.measured is None:
            return None
        expected, found = getattr(self.predicted, category), getattr(self.measured, category)
        if not expected:
            return float("inf") if found else 0.0
        return (found - expected) / expected

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON, with bytes as integers."""
        found: dict[str, Any] = {
            "name": self.name,
            "parameters": self.parameters,
            "device": self.device,
            "onepass": self.ours,
            "by_formula": self.by_formula,
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
