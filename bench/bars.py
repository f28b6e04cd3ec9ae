"""The bars: what a run on a CPU has to show, computed from its own lines."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Line


@dataclass(frozen=True)
class Bar:
    """One bar: the other provider's time over ours has to be at least this."""

    text: str
    rule: str
    dtype: str
    states: str
    list: str
    other: str
    needed: float
    weights: str = "native"


BARS = [
    Bar("fp32 no slower than torch fused", "adamw", "fp32", "fp32", "50M", "torch-fused", 1.0),
    Bar("fp32 no slower than DeepSpeed", "adamw", "fp32", "fp32", "50M", "deepspeed-cpu", 1.0),
    Bar("all bf16 1.6x torch fused", "adamw", "bf16", "bf16", "50M", "torch-fused", 1.6),
    Bar("fp32 + mx8 1.3x torch fp32", "adamw", "fp32", "mx8", "50M", "torch-fused-fp32", 1.3),
    Bar(
        "bf16 + split8 + mx8 1.7x torch fp32",
        "adamw",
        "bf16",
        "mx8",
        "50M",
        "torch-fused-fp32",
        1.7,
        "split8",
    ),
    Bar(
        "bf16 + split8 + mx8 20x bitsandbytes",
        "adamw",
        "bf16",
        "mx8",
        "50M",
        "bitsandbytes-8bit",
        20.0,
        "split8",
    ),
    Bar("300 one-element 10x torch fused", "adamw", "fp32", "fp32", "300x1", "torch-fused", 10.0),
    Bar(
        "20,000 one-element 10x torch fused",
        "adamw",
        "fp32",
        "fp32",
        "20000x1",
        "torch-fused",
        10.0,
    ),
    Bar("2,000 small 10x torch fused", "adamw", "fp32", "fp32", "2000x256", "torch-fused", 10.0),
    Bar("20,000 small 10x torch fused", "adamw", "fp32", "fp32", "20000x256", "torch-fused", 10.0),
]


@dataclass(frozen=True)
class Verdict:
    """A bar, both medians in ms and their ratio; None where one was not measured."""

    bar: Bar
    ours: float | None
    other: float | None

    @property
    def ratio(self) -> float | None:
        """Their time over ours."""
        return None if self.ours is None or self.other is None else self.other / self.ours

    @property
    def result(self) -> str:
        """ "pass", "fail" or "not measured"."""
        if self.ratio is None:
            return "not measured"
        return "pass" if self.ratio >= self.bar.needed else "fail"


def judge(lines: list[Line], ours: str = "onepass-cpu") -> list[Verdict]:
    """Every bar against the lines of one run."""

    def median(bar: Bar, provider: str) -> float | None:
        wanted = (provider, bar.rule, bar.dtype, bar.weights, bar.states, bar.list)
        for line in lines:
            keys = ("provider", "rule", "param_dtype", "weights", "states", "list")
            if tuple(line[key] for key in keys) == wanted:
                return float(line["ms"]["p50"])
        return None

    return [Verdict(bar, median(bar, ours), median(bar, bar.other)) for bar in BARS]
