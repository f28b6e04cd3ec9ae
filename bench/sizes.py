"""``python -m bench.sizes``: the time of a step against its size, and a linear fit of it.

Times AdamW in fp32 on one tensor of 1 K elements and more, as far as memory allows: onepass and
torch's fused step, interleaved. The fit is a constant, the cost of a step of any size, plus a slope
per element: one slope for sizes that stay in the caches, another for larger sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.devices import Device
from onepass_tools.benchmark.param_lists import in_words, one
from onepass_tools.benchmark.providers import all_providers, find
from onepass_tools.benchmark.timing import LIMITS, memory_of, run_case

from . import results
from .options import device_of, keep, parser_of
from .plot_styles import MARKERS, colour
from .results import Line

KIND = "sizes"
SIZES = [digit * 10**power for power in range(3, 10) for digit in (1, 3)][:-1]  # 1 K to 1 B
PROVIDERS = "onepass-cpu,onepass-cuda,torch-fused"


class Fit(NamedTuple):
    """The fit, in milliseconds.

    Attributes:
        constant: time of a step of size zero.
        cached: time per element for sizes up to ``last``, which stay in the caches.
        beyond: time per element for larger sizes.
        last: the largest size that stays in the caches.
    """

    constant: float
    cached: float
    beyond: float
    last: float

    def at(self, numel: float) -> float:
        """The time of a step with ``numel`` elements, according to the fit."""
        return self.constant + numel * (self.cached if numel <= self.last else self.beyond)


def straight(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(constant, slope) of a line through points (size, time); neither is negative.

    Minimises the squared relative error, so that small and large steps have the same weight.
    """
    weights = [(1 / t**2, n, t) for n, t in points]
    s0 = sum(w for w, _, _ in weights)
    s1 = sum(w * n for w, n, _ in weights)
    s2 = sum(w * n * n for w, n, _ in weights)
    t0 = sum(w * t for w, _, t in weights)
    t1 = sum(w * n * t for w, n, t in weights)
    determinant = s0 * s2 - s1 * s1
    constant = (s2 * t0 - s1 * t1) / determinant
    slope = (s0 * t1 - s1 * t0) / determinant
    if constant < 0:
        return 0.0, t1 / s2
    if slope < 0:
        return t0 / s0, 0.0
    return constant, slope


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Fits a constant and two slopes to points (size, time): one in the caches, one in memory.

    The size at which the slope changes is the one with the smallest squared relative error. Each
    slope covers at least two sizes; with too few points there is only one slope.
    """
    points = sorted(points)

    def error(found: Fit) -> float:
        return sum((found.at(n) / t - 1) ** 2 for n, t in points)

    constant, slope = straight(points)
    best = Fit(constant, slope, slope, points[-1][0])
    for count in range(2, len(points) - 1):
        constant, cached = straight(points[:count])
        rest = [(n, t - constant, t) for n, t in points[count:]]
        beyond = sum(n * d / t**2 for n, d, t in rest) / sum(n * n / t**2 for n, _, t in rest)
        found = Fit(constant, cached, max(0.0, beyond), points[count - 1][0])
        best = min(best, found, key=error)
    return best


def measure(device: Device, most: int, samples: int | None) -> Iterator[list[Line]]:
    """Measures each size; yields its result lines.

    Args:
        device: the device to measure.
        most: the largest number of elements; sizes that do not fit in memory are left out.
        samples: timed steps per provider; None for the default of the case.
    """
    chosen = [p for p in find(all_providers(device.type), None) if p.name in PROVIDERS.split(",")]
    available = [p for p in chosen if not p.unavailable(device.type)]
    env = results.environment(device.type)
    for numel in (n for n in SIZES if n <= most):
        case = Case("adamw", "fp32", "fp32", one(numel))
        free = device.free()
        if free is not None and memory_of(case, device) > free:
            print(f"{in_words(numel)} elements do not fit in the free memory of {device.name}")
            break
        outcome = run_case(case, available, samples, device=device)
        new = [line | {"kind": KIND} for line in results.lines(env, outcome)]
        for line in new:
            print(f"{in_words(numel):>6}  {line['provider']:<14} {line['ms']['p50']:>10.4f} ms")
        for name, why in outcome.failed:
            print(f"{in_words(numel):>6}  {name:<14} not timed: {why}")
        yield new
        outcome.timed.clear()
        del outcome
        device.release()


def table(lines: Sequence[Line]) -> list[str]:
    """The newest run of each device, as Markdown: the fit, and the times divided by the fit."""
    text: list[str] = []
    for device in dict.fromkeys(line["device"] for line in lines):
        run = newest_run(lines, device)
        names = [n for n in dict.fromkeys(x["provider"] for x in run) if n not in LIMITS]
        fits = {name: fit(_points(run, name)) for name in names}
        text += [f"{device}; {results.origin(run[0])}.", ""]
        per_element = run[0]["bytes"] / run[0]["numel"]
        for name in names:
            found = fits[name]
            words = [f"{1e3 * found.constant:.1f} µs"]
            for slope, where in ((found.cached, "up to"), (found.beyond, "beyond")):
                if slope and (found.cached != found.beyond or where == "up to"):
                    gbps = f"{per_element / slope / 1e6:.1f} GB/s"
                    words.append(f"{gbps} {where} {in_words(int(found.last))} elements")
            text.append(f"- {name}: {', '.join(words)}")
        text += [
            "",
            f"| elements | {' | '.join(f'{n}, ms | time / fit' for n in names)} | copy, ms |",
        ]
        text.append("|---:|" + "---:|---:|" * len(names) + "---:|")
        for numel in dict.fromkeys(line["numel"] for line in run):
            row = [in_words(numel)]
            for name in names:
                time = _time(run, name, numel)
                part = "" if time is None else f"{time / fits[name].at(numel):.2f}"
                row += ["" if time is None else f"{time:.4f}", part]
            # For small steps, the copy moves more bytes than the step, so its time is not shown.
            copy = next(x for x in run if x["provider"] == "copy" and x["numel"] == numel)
            moved = next(
                x["bytes"] for x in run if x["numel"] == numel and x["provider"] not in LIMITS
            )
            row.append(f"{copy['ms']['p50']:.4f}" if copy["bytes"] == moved else "")
            text.append(f"| {' | '.join(row)} |")
        text.append("")
    return text[:-1]


def newest_run(lines: Sequence[Line], device: str) -> list[Line]:
    """The lines of the last run on a device."""
    own = [line for line in lines if line["device"] == device]
    return [line for line in own if line["date"] == max(line["date"] for line in own)]


def _points(run: Sequence[Line], provider: str) -> list[tuple[float, float]]:
    return [(x["numel"], x["ms"]["p50"]) for x in run if x["provider"] == provider]


def _time(run: Sequence[Line], provider: str, numel: int) -> float | None:
    return dict(_points(run, provider)).get(numel)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draws time against size on logarithmic axes, with the fits; one panel per device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    devices = list(dict.fromkeys(line["device"] for line in lines))
    figure, panels = plt.subplots(
        1, len(devices), figsize=(7.5 * len(devices), 4.5), layout="constrained", squeeze=False
    )
    for axes, device in zip(panels[0], devices, strict=True):
        run = newest_run(lines, device)
        for name in dict.fromkeys(line["provider"] for line in run):
            points = _points(run, name)
            if name in LIMITS or len(points) < 2:
                continue
            found = fit(points)
            x, y = zip(*points, strict=True)
            axes.plot(x, y, MARKERS.get(name, "x"), color=colour(name), label=name)
            axes.plot(x, [found.at(n) for n in x], color=colour(name), linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="time per step, ms (p50)")
        axes.set_title(device, fontsize=9)
        axes.grid(color="0.9")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "AdamW, fp32, one tensor; lines: fits of a constant plus a slope, in caches and in memory",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 0 on success, 2 on wrong usage or if the device is missing."""
    parser = parser_of(KIND, __doc__, None, "timed steps per size and provider")
    parser.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="the largest number of elements (default 1e8 on a CPU, 1e9 on a GPU)",
    )
    args = parser.parse_args(argv)
    device = device_of(parser, args, "most")
    if device is None:
        return 2
    most = args.most or (10**8 if device.type == "cpu" else 10**9)
    for lines in measure(device, most, args.samples):
        keep(args, KIND, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
