"""docs/training.md and docs/training.png from the lines of ``python -m bench.training``.

No figure is written by hand, and the verdicts are computed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onepass_tools.compare.stats import interval

from . import results
from .results import Line

RMS_LIMITS = {"mx4": 0.20}  # largest relative difference of the rms step from the baseline
RMS_LIMIT = 0.03  # the same for all other state formats
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a weight, and of its gradient
COMMON = ("shape", "batch", "steps", "validation_batches", "corpus_bytes", "max_grad_norm")


@dataclass(frozen=True)
class Verdict:
    """The comparison of a configuration with its baseline over the same seeds.

    Attributes:
        settings: the settings of the configuration.
        difference: mean of the final validation loss minus that of the baseline.
        interval: half the width of the 95 % interval of the difference.
        spread: standard deviation of the final losses of the baseline over the seeds.
        rms: rms of the step divided by that of the baseline, minus 1.
        pairs: the difference of each seed.
    """

    settings: Line
    difference: float
    interval: float
    spread: float
    rms: float
    pairs: tuple[float, ...]

    @property
    def rms_limit(self) -> float:
        """The largest magnitude of ``rms`` at parity."""
        return RMS_LIMITS.get(self.settings["states"], RMS_LIMIT)

    @property
    def loss_inside(self) -> bool:
        """Whether the difference is at most the spread of seeds."""
        return abs(self.difference) <= self.spread

    @property
    def parity(self) -> bool:
        """Whether the loss and the rms of the step are both within their limits."""
        return self.loss_inside and abs(self.rms) <= self.rms_limit

    def sentence(self) -> str:
        """The verdict in words, with the numbers that it is based on."""
        is_lion = self.settings["rule"] == "lion"
        size = f"the rms of the step differs by {self.rms:+.1%} (limit {self.rms_limit:.0%})"
        reach = abs(self.difference) + self.interval
        spread = f"the spread of seeds ({self.spread:.4f})"
        if not self.loss_inside:
            where = f"the difference is outside {spread}"
        elif reach <= self.spread:
            where = f"the whole interval is within {spread}"
        else:
            where = f"the difference is within {spread}, but not its whole interval"
        return (
            f"- **{self.settings['name']}**: {'parity' if self.parity else 'no parity'}. The loss "
            f"differs by {self.difference:+.4f} ± {self.interval:.4f}; {where}; "
            + ("every step of Lion has the same size." if is_lion else f"{size}.")
        )


def newest(lines: list[Line]) -> list[Line]:
    """The newest line of each machine, settings and seed."""
    found: dict[Any, Line] = {}
    for line in lines:
        key = (line["device"], repr(sorted(line["settings"].items())), line["seed"])
        if key not in found or line["date"] >= found[key]["date"]:
            found[key] = line
    return list(found.values())


def by_config(lines: list[Line]) -> dict[str, dict[int, Line]]:
    """The lines by configuration and seed."""
    found: dict[str, dict[int, Line]] = {}
    for line in lines:
        found.setdefault(line["settings"]["name"], {})[line["seed"]] = line
    return found


def judge(runs: dict[str, dict[int, Line]]) -> list[Verdict]:
    """A verdict for each configuration with a baseline and at least two seeds in common."""
    found = []
    for own in runs.values():
        settings = next(iter(own.values()))["settings"]
        base = runs.get(settings["baseline"], {})
        seeds = sorted(own.keys() & base.keys())
        if len(seeds) < 2:
            continue
        pairs = tuple(own[s]["validation_loss"] - base[s]["validation_loss"] for s in seeds)
        found.append(
            Verdict(
                settings,
                *interval(pairs),
                statistics.stdev(base[s]["validation_loss"] for s in seeds),
                statistics.mean(own[s]["rms_u"] / base[s]["rms_u"] for s in seeds) - 1,
                pairs,
            )
        )
    return found


def _mean(own: dict[int, Line], name: str) -> float:
    return statistics.mean(float(line[name]) for line in own.values())


def table(runs: dict[str, dict[int, Line]]) -> list[str]:
    """One row per configuration."""
    verdicts = {verdict.settings["name"]: verdict for verdict in judge(runs)}
    head = "configuration|bytes|seeds|loss|loss - baseline|rms u|rms u / baseline"
    head += "|rms u / exact|projection|signs differ|max u"
    rows = [f"| {head.replace('|', ' | ')} |", "|---|" + "---:|" * head.count("|")]
    for name, own in runs.items():
        verdict = verdicts.get(name)
        settings = next(iter(own.values()))["settings"]
        held = 2 * BYTES[settings["dtype"]] + _mean(own, "state_bytes")
        difference = ratio = ""
        if verdict is not None:
            difference = f"{verdict.difference:+.4f} ± {verdict.interval:.4f}"
            ratio = f"{verdict.rms + 1:.3f}"
        cells = [
            name,
            f"{held:.2f}",
            str(len(own)),
            f"{_mean(own, 'validation_loss'):.4f}",
            difference,
            f"{_mean(own, 'rms_u'):.4f}",
            ratio,
            f"{_mean(own, 'rms_u') / _mean(own, 'rms_u_exact'):.3f}",
            f"{_mean(own, 'projection'):.3f}",
            f"{_mean(own, 'signs_differ'):.1%}",
            f"{max(line['max_u'] for line in own.values()):.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _setup(lines: list[Line]) -> str:
    """The description of the training runs."""
    one = lines[0]
    s, shape = one["settings"], one["settings"]["shape"]
    rules = {}
    for line in lines:
        own = line["settings"]
        rules[own["rule"]] = (
            f"{own['rule']}: lr {own['lr']:g}, betas {tuple(own['betas'])}, weight decay "
            f"{own['weight_decay']:g} on matrices"
        )
    return (
        f"A byte-level GPT of {one['parameters']:,} parameters (width {shape['width']}, depth "
        f"{shape['depth']}, context {shape['context']}) is trained for {s['steps']} steps of "
        f"{s['batch']} windows of the standard library of Python {one['python']}, and validated "
        f"on {s['validation_batches'] * s['batch']} windows of other files of the library. "
        + "; ".join(rules.values())
        + f". Gradients are clipped to a norm of {s['max_grad_norm']:g}; the learning rate has a "
        "warm-up and a cosine decay."
    )


def _spread(verdicts: list[Verdict], runs: dict[str, dict[int, Line]]) -> list[str]:
    bases = dict.fromkeys(verdict.settings["baseline"] for verdict in verdicts)
    return [
        f"- {base}: mean loss {statistics.mean(losses):.4f}, standard deviation over "
        f"{len(losses)} seeds {statistics.stdev(losses):.4f}, lowest {min(losses):.4f}, highest "
        f"{max(losses):.4f}"
        for base in bases
        if len(losses := [line["validation_loss"] for line in runs[base].values()]) > 1
    ]


def _runs(lines: list[Line]) -> str:
    dates = sorted(line["date"] for line in lines)
    found = sorted({(str(x["commit"])[:12], bool(x["dirty"]), x["torch"]) for x in lines})
    return f"{dates[0]} to {dates[-1]}; " + "; ".join(
        f"commit {commit}{' with uncommitted changes' if dirty else ''}, torch {torch}"
        for commit, dirty, torch in found
    )


def sections(lines: list[Line]) -> list[list[Line]]:
    """The lines in comparable groups: each from one machine and with the same amount of work."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        common = [line["settings"][name] for name in COMMON]
        groups.setdefault(repr((line["device"], common)), []).append(line)
    return list(groups.values())


def markdown(lines: list[Line], source: str, order: Sequence[str], picture: str | None) -> str:
    """The page.

    Args:
        lines: the result of :func:`newest`.
        source: name of the file that the lines are from.
        order: names of the configurations in the order of the rows.
        picture: file name of the picture, or None.
    """
    text = [
        "# Training with each format",
        "",
        f"Generated by `python -m bench.training --report` from {source}: do not edit.",
        "Measured by `python -m bench.training`, one thread per run.",
        "",
        "- **loss**: validation loss after the last step in nats per byte, mean over the seeds. "
        "**loss - baseline**: the difference from the baseline with the same seeds (initial "
        "weights and batches), mean and 95 % interval (paired t).",
        "- **u**: the step without weight decay, divided by the learning rate, computed from the "
        "gradient and the averages (moments) as the optimizer stores them. Each run also computes "
        "exact fp32 averages of its own gradients. **rms u / exact** is the root mean square of u "
        "divided by that of the step from the exact averages. **projection** is u projected on "
        "that step, as a fraction of it. **signs differ** is the share of elements that moved in "
        "the other direction, or not at all.",
        "- **parity**: the mean difference of the loss is at most the spread of seeds (standard "
        "deviation of the baseline's losses), *and* the rms of u is within 3 % of that of the "
        "baseline for 8-bit states, or 20 % for 4-bit states. The loss is not enough: a format "
        "whose steps are too large can have a lower loss.",
        "- **bytes**: measured bytes per parameter of the weight, its gradient and everything that "
        "the optimizer stores.",
        "- *last bits changed*: each initial weight is moved to a neighbour in fp32. This shows "
        "how much runs differ without any change of format.",
        "",
        "The model computes in fp32 on a CPU with the values of the weights, so that runs differ "
        "only in the formats. bf16 weights, including norms and embeddings, get bf16 gradients.",
        "",
        "Not measured: GPUs, larger models, long runs, beta2 above 0.999, rules other than AdamW "
        "and Lion.",
    ]
    for section in sections(lines):
        found = by_config(section)
        known = [name for name in order if name in found]
        runs = {name: found[name] for name in [*known, *(n for n in found if n not in known)]}
        verdicts = judge(runs)
        text += ["", f"## {section[0]['device']}", "", _setup(section), ""]
        text += [f"Runs: {_runs(section)}.", "", *table(runs), "", "### Spread of seeds", ""]
        text += _spread(verdicts, runs) or ["Not known: there is only one seed."]
        text += ["", "### Which formats reach parity", ""]
        formats = [verdict for verdict in verdicts if not verdict.settings["perturbed"]]
        text += [verdict.sentence() for verdict in formats] or [
            "Not known: a comparison needs at least two seeds."
        ]
        if picture is not None:
            text += ["", f"![Difference of the final loss by format]({picture})"]
        picture = None  # the picture belongs to the first section only
    return "\n".join(text) + "\n"


def draw(verdicts: list[Verdict], path: Path) -> None:
    """Draws the differences by seed with their mean and interval, and the spread of seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.5 * len(verdicts)), layout="constrained")
    for row, verdict in enumerate(verdicts):
        band = "one spread of the baseline's seeds" if row == 0 else None
        axes.barh(-row, 2 * verdict.spread, 0.8, -verdict.spread, color="0.9", label=band)
        axes.errorbar(
            verdict.difference,
            -row,
            xerr=verdict.interval,
            fmt="D",
            color="#0072B2",
            capsize=4,
            label="mean, 95 % interval" if row == 0 else None,
        )
        seed = "one seed" if row == 0 else None
        x = list(verdict.pairs)
        axes.scatter(x, [-row - 0.2] * len(x), s=14, color="#E69F00", zorder=3, label=seed)
    axes.axvline(0.0, color="0.4", linewidth=1)
    names = [verdict.settings["name"] for verdict in verdicts]
    axes.set_yticks([-row for row in range(len(verdicts))], names)
    axes.set_xlabel("final validation loss minus the baseline's of the same seed (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(path: Path, docs: Path, order: Sequence[str]) -> int:
    """Writes the page and the picture into ``docs``.

    Returns:
        0 on success; 2 if ``path`` has no result lines.
    """
    lines = [x for x in results.read_lines(path) if x.get("kind") == "training"]
    lines = newest(lines)
    if not lines:
        print(f"bench.training: no result lines in {path}; run python -m bench.training first")
        return 2
    docs.mkdir(parents=True, exist_ok=True)
    found = by_config(sections(lines)[0])
    verdicts = judge({name: found[name] for name in order if name in found})
    if verdicts:
        draw(verdicts, docs / "training.png")
    root = results.ROOT
    source = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    page = docs / "training.md"
    picture = "training.png" if verdicts else None
    page.write_text(markdown(lines, source, order, picture), encoding="utf-8")
    print(f"wrote {page}", file=sys.stderr)
    return 0
