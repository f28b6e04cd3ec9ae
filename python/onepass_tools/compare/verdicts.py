"""Decides from the measurements whether each textbook claim holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from onepass_tools.compare.algorithms import BY_KEY
from onepass_tools.compare.lr_sweep import steps_to_target
from onepass_tools.compare.stats import interval, shown

HOLDS, CONTRADICTED, INCONCLUSIVE = "holds", "**contradicted**", "inconclusive"
SEEDS = 3
"""With fewer seeds, an interval is too wide to decide anything: its t quantile is 12.7."""


class Verdict(NamedTuple):
    """A claim, the outcome of its test, and the measured figures."""

    claim: str
    outcome: str
    measured: str


def judge(results: dict[str, Any]) -> list[Verdict]:
    """The verdicts on all claims that the results can test."""
    found = _small(results["claims"])
    for name, task in results["tasks"].items():
        found += _of_task(name, task)
    return found


def _truth(condition: bool) -> str:
    return HOLDS if condition else CONTRADICTED


def compare(lower: Sequence[float | None], higher: Sequence[float | None]) -> str:
    """Whether the first values are lower, by a 95 % interval of paired differences per seed.

    Inconclusive if the interval contains 0, or with fewer than SEEDS seeds.
    """
    pairs = [(a, b) for a, b in zip(lower, higher, strict=True) if a is not None and b is not None]
    if len(pairs) < SEEDS:
        return INCONCLUSIVE
    mean, half = interval([b - a for a, b in pairs])
    if not math.isfinite(mean) or abs(mean) <= half:
        return INCONCLUSIVE
    return _truth(mean > 0)


def _small(claims: dict[str, Any]) -> list[Verdict]:
    momentum, adamw = claims["oscillation"]["momentum"], claims["oscillation"]["adamw"]
    p, decay = claims["step exponent"], claims["decay taken"]
    lion, cliff = claims["lion steps over lr"], claims["cliff"]
    free, clipped = cliff["not clipped"], cliff["clipped at 1"]
    small, large = (decay[f"adam, gradients of {g}"] for g in ("0.1", "10"))
    same, also = (decay[f"adamw, gradients of {g}"] for g in ("0.1", "10"))
    return [
        Verdict(
            "SGD with momentum overshoots and oscillates, AdamW does not (line fit, lr 0.1 for "
            "both)",
            _truth(momentum["line crossings"] > 2 * max(1, adamw["line crossings"])),
            "how often the slope crosses its final value, and its overshoot: momentum "
            f"{momentum['line crossings']} and {momentum['line overshoot']:.0%}, AdamW "
            f"{adamw['line crossings']} and {adamw['line overshoot']:.0%}",
        ),
        Verdict(
            "the same in the ravine, each at its best learning rate",
            _truth(
                momentum["ravine crossings"] > 2 * max(1, adamw["ravine crossings"])
                and adamw["ravine crossings"] <= 2
            ),
            "how often the path crosses the floor: momentum "
            f"{momentum['ravine crossings']} (lr {momentum['ravine lr']:.2g}), AdamW "
            f"{adamw['ravine crossings']} (lr {adamw['ravine lr']:.2g}). AdamW overshoots by "
            f"{adamw['ravine overshoot']:.0%}, because its first moment acts as momentum",
        ),
        Verdict(
            "the same in the ravine, lr 0.01 for both",
            _truth(
                momentum["ravine crossings at lr 0.01"]
                > 2 * max(1, adamw["ravine crossings at lr 0.01"])
            ),
            "how often the path crosses the floor: momentum "
            f"{momentum['ravine crossings at lr 0.01']}, AdamW "
            f"{adamw['ravine crossings at lr 0.01']}. But after 200 steps, the loss is "
            f"{momentum['ravine loss at lr 0.01']:.1e} with momentum and "
            f"{adamw['ravine loss at lr 0.01']:.1e} with AdamW: at the same learning rate, they "
            "do not have the same speed",
        ),
        Verdict(
            "the steps of Adagrad decrease to zero",
            _truth(abs(p["adagrad"] + 0.5) < 0.1),
            f"with gradients of constant variance, the step size decreases as t^{p['adagrad']:.2f}",
        ),
        Verdict(
            "the steps of RMSprop do not",
            _truth(abs(p["rmsprop"]) < 0.1),
            f"the step size changes as t^{p['rmsprop']:.2f}, that of AdamW as t^{p['adamw']:.2f}",
        ),
        Verdict(
            "L2 regularization in Adam is not decoupled weight decay",
            _truth(small > 2 * large and abs(same - also) < 0.01),
            f"L2 in Adam reduces a weight by {small:.0%} with gradients of 0.1, and by "
            f"{large:.0%} with gradients of 10; the decay of AdamW reduces it by {same:.0%} and "
            f"{also:.0%}",
        ),
        Verdict(
            "the step of Lion has a constant size",
            _truth(lion["smallest"] == lion["largest"] == 1.0),
            f"{lion['smallest']:g} to {lion['largest']:g} times lr, for gradients of 1e-6 to 1e6",
        ),
        Verdict(
            "clipping limits the jump at a cliff of the loss",
            _truth(clipped["highest after it"] < clipped["first"] < free["highest after it"]),
            f"SGD starts at a loss of {free['first']:.1f} and reaches up to "
            f"{free['highest after it']:.3g}; with gradients clipped to norm 1, the loss is at "
            f"most {clipped['highest after it']:.3g} after the first step",
        ),
    ]


def _of_task(name: str, task: dict[str, Any]) -> list[Verdict]:
    rows = task["rows"]

    def pair(claim: str, low: str, high: str, what: str, digits: int = 3) -> Verdict:
        a, b = rows[low][what], rows[high][what]
        texts = [steps_to_target(x) if what == "reached" else shown(x, digits) for x in (a, b)]
        names = [BY_KEY[key].label for key in (low, high)]
        measured = ", ".join(f"{n} {t}" for n, t in zip(names, texts, strict=True))
        return Verdict(f"{name}: {claim}", compare(a, b), measured)

    cold, warm = task["adamw without warm-up"]["gap"], rows["adamw"]["gap"]
    wide = {key: row["decades"] for key, row in rows.items()}
    memory = {key: row["state bytes"] for key, row in rows.items()}
    return [
        pair("AdamW converges sooner than SGD with momentum", "adamw", "momentum", "reached"),
        pair("momentum converges sooner than SGD", "momentum", "sgd", "reached"),
        pair("Lion converges as fast as AdamW or faster", "lion", "adamw", "reached"),
        pair("SGD with momentum has a lower validation loss than AdamW",
             "momentum", "adamw", "validation"),
        pair("SGD with momentum has a smaller gap than AdamW", "momentum", "adamw", "gap"),
        pair("SGD with momentum ends in a flatter minimum than AdamW",
             "momentum", "adamw", "sharpness", 1),
        pair("SGD ends in a flatter minimum than AdamW", "sgd", "adamw", "sharpness", 1),
        Verdict(
            f"{name}: warm-up reduces the gap of AdamW",
            compare(warm, cold),
            f"with warm-up {shown(warm)}, without {shown(cold)}",
        ),
        Verdict(
            f"{name}: AdamW is the least sensitive to lr, SGD the most",
            _truth(
                wide["adamw"] >= max(wide.values()) and wide["sgd"] <= min(wide.values())
            ),
            "decades near the best: "
            + ", ".join(f"{BY_KEY[key].label} {value:.1f}" for key, value in wide.items()),
        ),
        Verdict(
            f"{name}: Lion stores half as many bytes of states as AdamW",
            _truth(abs(memory["lion"] / memory["adamw"] - 0.5) < 0.05),
            f"{memory['lion']:.2f} and {memory['adamw']:.2f} bytes per parameter",
        ),
    ]  # fmt: skip
