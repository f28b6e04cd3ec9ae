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

RMS_LIMITS = {"mx4": 0.20}  # how far the rms of the step may be from the baseline's
RMS_LIMIT = 0.03  # of any other state format
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a weight, and of its gradient
COMMON = ("shape", "batch", "steps", "validation_batches", "corpus_bytes", "max_grad_norm")


@dataclass(frozen=True)
class Verdict:
    """A configuration beside the baseline of the same seeds.

    Attributes:
        difference, interval: of the final validation losses, mean and half a 95 % interval.
        spread: standard deviation over the seeds of the baseline's final losses.
        rms: of the step, over that of the baseline, minus 1.
        pairs: the differences by themselves.
    """

    settings: Line
    difference: float
    interval: float
    spread: float
    rms: float
    pairs: tuple[float, ...]

    @property
    def rms_limit(self) -> float:
        return RMS_LIMITS.get(self.settings["states"], RMS_LIMIT)

    @property
    def loss_inside(self) -> bool:
        return abs(self.difference) <= self.spread

    @property
    def parity(self) -> bool:
        return self.loss_inside and abs(self.rms) <= self.rms_limit

    def sentence(self) -> str:
        """The verdict in words, with what it rests on."""
        is_lion = self.settings["rule"] == "lion"
        size = f"rms of the step {self.rms:+.1%} (limit {self.rms_limit:.0%})"
        reach = abs(self.difference) + self.interval
        where = f"{'inside' if self.loss_inside else 'outside'} the spread of seeds "
        where += f"({self.spread:.4f})"
        if self.loss_inside:
            where += ", as is" if reach <= self.spread else "; not so"
            where += " the whole interval"
        return (
            f"- **{self.settings['name']}**: {'parity' if self.parity else 'no parity'}. Loss "
            f"{self.difference:+.4f} ± {self.interval:.4f}, {where}; "
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
    head = "configuration|bytes|seeds|loss|minus the baseline's|rms u|over the baseline's"
    head += "|over the exact|projection|signs differ|max u"
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
    """What was trained, in words."""
    one = lines[0]
    s, shape = one["settings"], one["settings"]["shape"]
    rules = {}
    for line in lines:
        own = line["settings"]
        rules[own["rule"]] = (
            f"{own['rule']}: lr {own['lr']:g}, betas {tuple(own['betas'])}, decay "
            f"{own['weight_decay']:g} on matrices"
        )
    return (
        f"A byte-level GPT of {one['parameters']:,} parameters (width {shape['width']}, depth "
        f"{shape['depth']}, context {shape['context']}), {s['steps']} steps of {s['batch']} "
        f"windows, trained on Python {one['python']}'s standard library, validated on "
        f"{s['validation_batches'] * s['batch']} windows of other files of it. "
        + "; ".join(rules.values())
        + f"; gradients clipped at {s['max_grad_norm']:g}, warm-up and cosine."
    )


def _spread(verdicts: list[Verdict], runs: dict[str, dict[int, Line]]) -> list[str]:
    bases = dict.fromkeys(verdict.settings["baseline"] for verdict in verdicts)
    return [
        f"- {base}: {statistics.mean(losses):.4f}, spread over {len(losses)} seeds "
        f"{statistics.stdev(losses):.4f} (lowest {min(losses):.4f}, highest {max(losses):.4f})"
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
    """The lines that can be compared: of one machine and one size of run."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        common = [line["settings"][name] for name in COMMON]
        groups.setdefault(repr((line["device"], common)), []).append(line)
    return list(groups.values())


def markdown(lines: list[Line], source: str, order: Sequence[str], picture: str | None) -> str:
    """The page. lines: those of :func:`newest`; order: names of configurations, first to last."""
    text = [
        "# Training with each format",
        "",
        f"Generated by `python -m bench.training --report` from {source}: do not edit.",
        "Measured by `python -m bench.training`, one thread per run.",
        "",
        "- **loss**: validation loss after the last step, nats per byte, mean over the seeds. "
        "**minus the baseline's**: of the same seeds (initial weights and batches), mean and 95 % "
        "interval of the paired t.",
        "- **u**: the step over the learning rate, without decay, as it was taken: from the "
        "averages as stored, decoded, and the gradient. Beside each run go exact fp32 averages of "
        "the gradients that the run itself sees; **over the exact** is the rms of u over that of "
        "theirs, **projection** the part of their step that was taken, **signs differ** the share "
        "of elements that went the other way or stood still.",
        "- **parity**: the mean difference is within one spread of seeds (standard deviation of "
        "the baseline's losses) *and* the rms of u within 3 % of the baseline's with 8-bit states, "
        "20 % with 4-bit ones. Loss alone rewards a format that steps too far.",
        "- **bytes**: per parameter, of the weight, its gradient and everything the optimizer "
        "holds, as measured.",
        "- *last bits changed*: each initial weight moved to a neighbour in fp32: how far runs "
        "part with no format at all.",
        "",
        "The model computes in fp32 with the values that the weights hold, on a CPU, so formats "
        "are all that differs; bf16 weights, norms and embeddings included, get bf16 gradients.",
        "",
        "Not measured: a GPU, larger models, long runs, beta2 above 0.999, rules other than AdamW "
        "and Lion.",
    ]
    for section in sections(lines):
        found = by_config(section)
        known = [name for name in order if name in found]
        runs = {name: found[name] for name in [*known, *(n for n in found if n not in known)]}
        verdicts = judge(runs)
        text += ["", f"## {section[0]['device']}", "", _setup(section), ""]
        text += [f"Runs: {_runs(section)}.", "", *table(runs), "", "### Spread of seeds", ""]
        text += _spread(verdicts, runs) or ["One seed: none."]
        text += ["", "### Which formats reach parity", ""]
        formats = [verdict for verdict in verdicts if not verdict.settings["perturbed"]]
        text += [verdict.sentence() for verdict in formats] or ["Not enough seeds to say."]
        if picture is not None:
            text += ["", f"![Difference of the final loss by format]({picture})"]
        picture = None  # one picture, beside the section that it shows
    return "\n".join(text) + "\n"


def draw(verdicts: list[Verdict], path: Path) -> None:
    """Differences by seed, their mean and interval, on one spread of seeds as a band."""
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
    """Writes the page and the picture; 0 done, 2 nothing to read."""
    lines = [x for x in results.read_lines(path) if x.get("kind") == "training"]
    lines = newest(lines)
    if not lines:
        print(f"bench.training: no result lines in {path}; run it without --report first")
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
