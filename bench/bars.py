"""The performance targets ("bars"), computed from the result lines of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .results import Line


@dataclass(frozen=True)
class Bar:
    """One target: a lower limit for a ratio.

    The ratio is the time of another provider divided by that of onepass. If ``other`` is "copy", it
    is the bandwidth of onepass divided by that of the copy.

    Attributes:
        text: the target in words.
        rule, dtype, states, list, weights: the case.
        other: name of the other provider, or "copy".
        needed: the lower limit.
        field: the time that is compared, "ms" or "host_us".
    """

    text: str
    rule: str
    dtype: str
    states: str
    list: str
    other: str
    needed: float
    weights: str = "native"
    field: str = "ms"


BARS = [
    Bar("fp32 no slower than torch fused", "adamw", "fp32", "fp32", "50M", "torch-fused", 1.0),
    Bar("fp32 no slower than DeepSpeed", "adamw", "fp32", "fp32", "50M", "deepspeed-cpu", 1.0),
    Bar("all bf16: 1.6x torch fused", "adamw", "bf16", "bf16", "50M", "torch-fused", 1.6),
    Bar("fp32 + mx8: 1.3x torch fp32", "adamw", "fp32", "mx8", "50M", "torch-fused-fp32", 1.3),
    Bar(
        "bf16 + split8 + mx8: 1.7x torch fp32",
        "adamw",
        "bf16",
        "mx8",
        "50M",
        "torch-fused-fp32",
        1.7,
        "split8",
    ),
    Bar(
        "bf16 + split8 + mx8: 20x bitsandbytes",
        "adamw",
        "bf16",
        "mx8",
        "50M",
        "bitsandbytes-8bit",
        20.0,
        "split8",
    ),
    Bar("300 scalars: 5x torch fused", "adamw", "fp32", "fp32", "300x1", "torch-fused", 5.0),
    Bar(
        "20,000 scalars: 4x torch fused",
        "adamw",
        "fp32",
        "fp32",
        "20000x1",
        "torch-fused",
        4.0,
    ),
    Bar("2,000 tensors: 5x torch fused", "adamw", "fp32", "fp32", "2000x256", "torch-fused", 5.0),
    Bar("20,000 tensors: 4x torch fused", "adamw", "fp32", "fp32", "20000x256", "torch-fused", 4.0),
]


_MODEL = "llama3-8B/16"
GPU_BARS = [
    Bar("fp32: 0.97 of the copy", "adamw", "fp32", "fp32", _MODEL, "copy", 0.97),
    Bar(
        "bf16 + split16: 0.95 of the copy", "adamw", "bf16", "bf16", _MODEL, "copy", 0.95, "split16"
    ),
    Bar(
        "bf16 + split16 + mx8: 0.90 of the copy",
        "adamw",
        "bf16",
        "mx8",
        _MODEL,
        "copy",
        0.9,
        "split16",
    ),
    Bar(
        "host time, 300 tensors: 5x torch fused",
        "adamw",
        "fp32",
        "fp32",
        "300x256",
        "torch-fused",
        5.0,
        field="host_us",
    ),
    Bar(
        "host time, 20,000 tensors: 4x torch fused",
        "adamw",
        "fp32",
        "fp32",
        "20000x256",
        "torch-fused",
        4.0,
        field="host_us",
    ),
]
BY_DEVICE = {"cpu": ("onepass-cpu", BARS), "cuda": ("onepass-cuda", GPU_BARS)}


@dataclass(frozen=True)
class Verdict:
    """A target with the measured ratio, which is None if it was not measured."""

    bar: Bar
    ratio: float | None

    @property
    def result(self) -> str:
        """ "pass", "fail" or "not measured"."""
        if self.ratio is None:
            return "not measured"
        return "pass" if self.ratio >= self.bar.needed else "fail"

    @property
    def shown(self) -> str:
        """The ratio, rounded down so that a failure never looks like a pass; "" for None."""
        return "" if self.ratio is None else f"{math.floor(self.ratio * 1000) / 1000:.3f}"


def judge(lines: list[Line], device: str = "cpu") -> list[Verdict]:
    """Compares the lines of one run with every target of a device type, "cpu" or "cuda"."""
    provider, bars = BY_DEVICE[device]

    def of(bar: Bar, provider: str) -> Line | None:
        wanted = (provider, bar.rule, bar.dtype, bar.weights, bar.states, bar.list)
        for line in lines:
            keys = ("provider", "rule", "param_dtype", "weights", "states", "list")
            if tuple(line[key] for key in keys) == wanted:
                return line
        return None

    def ratio(bar: Bar) -> float | None:
        ours, other = of(bar, provider), of(bar, bar.other)
        if ours is None or other is None:
            return None
        if bar.other == "copy":
            return float(ours["share"])
        theirs, mine = (
            x["ms"]["p50"] if bar.field == "ms" else x[bar.field] for x in (other, ours)
        )
        return None if not theirs or not mine else float(theirs / mine)

    return [Verdict(bar, ratio(bar)) for bar in bars]
