"""Rungs of a ladder: checks, interleaved timing, result lines and the table of the report."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from onepass_tools.benchmark.devices import Device
from onepass_tools.benchmark.timing import percentile

from .. import results
from ..results import Line

KIND = "ladder"
WARM_UP = 2


def _nothing() -> None:
    pass


@dataclass
class Rung:
    """One version of the step.

    Attributes:
        name: what it changes compared with the rung before it.
        step: the function that is timed.
        weights: the tensors that a step updates.
        before: called before each step, untimed.
        exact: whether its results must have the same bits as those of the other exact rungs.
        samples: measured times in milliseconds.
    """

    name: str
    step: Callable[[], Any]
    weights: Sequence[Any]
    before: Callable[[], Any] = _nothing
    exact: bool = True
    samples: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Runs one step without timing it."""
        self.before()
        self.step()


def check(make: Callable[[], list[Rung]], steps: int = 2) -> None:
    """Runs a few steps of every rung, each on its own tensors, and compares the weights.

    Raises:
        RuntimeError: exact rungs returned different bits, or another rung differs from them by more
            than a thousandth of the largest change of a weight.
    """
    import torch

    first = [weight.detach().double().cpu() for weight in make()[0].weights]
    found: list[tuple[Rung, list[torch.Tensor]]] = []
    for index in range(len(make())):
        rung = make()[index]
        for _ in range(steps):
            rung.take()
        found.append((rung, [weight.detach().double().cpu() for weight in rung.weights]))
    exact = next(weights for rung, weights in found if rung.exact)
    way = max(float((a - b).abs().max()) for a, b in zip(exact, first, strict=True))
    for rung, weights in found:
        off = max(float((a - b).abs().max()) for a, b in zip(weights, exact, strict=True))
        if not way > 0 or not off <= (0.0 if rung.exact else 1e-3 * way):
            raise RuntimeError(
                f"{rung.name}: weights are up to {off:g} away from those of the exact rungs"
            )


def measure(rungs: Sequence[Rung], device: Device, samples: int, warm: bool = False) -> None:
    """Times all rungs, interleaved, and fills their samples.

    Args:
        rungs: the rungs.
        device: the device to time on.
        samples: number of samples per rung.
        warm: whether untimed steps precede each sample, so that the caches are warm.
    """
    for rung in rungs:
        for _ in range(WARM_UP):
            rung.take()
    device.synchronize()
    host = {}
    for rung in rungs:
        rung.before()
        host[rung.name] = device.host_us(rung.step)
    shuffle = random.Random(0)
    for _ in range(samples):
        for rung in shuffle.sample(list(rungs), len(rungs)):
            rung.before()
            device.prepare(rung.step, host[rung.name], warm)
            rung.samples.append(device.time(rung.step))


def lines(env: Line, rungs: Sequence[Rung], ladder: str, moved: int) -> list[Line]:
    """One result line per rung, in the given order.

    Args:
        env: see :func:`bench.results.environment`; taken before a rung changes the instruction set.
        rungs: the measured rungs.
        ladder: name of the ladder.
        moved: bytes that a step reads and writes, by the formula of the case.
    """
    found = []
    for rung in rungs:
        ms = {f"p{p}": round(percentile(rung.samples, p), 5) for p in (20, 50, 80)}
        found.append(
            {
                **env,
                "kind": KIND,
                "ladder": ladder,
                "rung": rung.name,
                "bytes": moved,
                "ms": ms,
                "samples": [round(sample, 5) for sample in rung.samples],
                "gbps": round(moved / ms["p50"] / 1e6, 4),
            }
        )
    return found


def table(all_lines: Sequence[Line]) -> list[str]:
    """The newest run of each ladder on each device, as Markdown."""
    text: list[str] = []
    for device, ladder in dict.fromkeys((line["device"], line["ladder"]) for line in all_lines):
        own = [x for x in all_lines if (x["device"], x["ladder"]) == (device, ladder)]
        run = [line for line in own if line["date"] == max(line["date"] for line in own)]
        text += [f"{ladder}. {device}; {results.origin(run[0])}.", ""]
        text += ["| rung | p20 ms | p50 ms | p80 ms | GB/s | speed-up over the rung above |"]
        text += ["|---|---:|---:|---:|---:|---:|"]
        above = None
        for line in run:
            ms = " | ".join(f"{line['ms'][key]:.3f}" for key in ("p20", "p50", "p80"))
            gain = "" if above is None else f"{above / line['ms']['p50']:.2f}x"
            text.append(f"| {line['rung']} | {ms} | {line['gbps']:.2f} | {gain} |")
            above = line["ms"]["p50"]
        text.append("")
    return text[:-1]
