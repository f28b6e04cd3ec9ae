"""Decides from the measurements whether each textbook claim holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from onepass_tools.compare.algorithms import BY_KEY
from onepass_tools.compare.lr_sweep import steps_to_target
from onepass_tools.compare.stats import interval, shown

HOLDS, CONTRADICTED, UNDECIDED = "holds", "**contradicted**", "undecided"


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
    """Whether the first values are lower, by a 95 % interval of paired differences per seed."""
    pairs = [(a, b) for a, b in zip(lower, higher, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return UNDECIDED
    mean, half = interval([b - a for a, b in pairs])
    if not math.isfinite(mean) or abs(mean) <= half:
        return UNDECIDED
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
            "SGD with momentum overshoots and oscillates where AdamW lands smoothly (the line, lr "
            "0.1 for both)",
            _truth(momentum["line crossings"] > 2 * max(1, adamw["line crossings"])),
            f"the slope crosses its goal {momentum['line crossings']} times and overshoots by "
            f"{momentum['line overshoot']:.0%}; AdamW {adamw['line crossings']} and "
            f"{adamw['line overshoot']:.0%}",
        ),
        Verdict(
            "the same in the ravine, each at its best rate",
            _truth(
                momentum["ravine crossings"] > 2 * max(1, adamw["ravine crossings"])
                and adamw["ravine crossings"] <= 2
            ),
            f"momentum (lr {momentum['ravine lr']:.2g}) crosses the floor "
            f"{momentum['ravine crossings']} times, AdamW (lr {adamw['ravine lr']:.2g}) "
            f"{adamw['ravine crossings']} times, overshooting by {adamw['ravine overshoot']:.0%}: "
            "its first moment is momentum too",
        ),
        Verdict(
            "the same in the ravine, lr 0.01 for both",
            _truth(
                momentum["ravine crossings at lr 0.01"]
                > 2 * max(1, adamw["ravine crossings at lr 0.01"])
            ),
            f"{momentum['ravine crossings at lr 0.01']} crossings against "
            f"{adamw['ravine crossings at lr 0.01']}; but after 200 steps the loss is "
            f"{momentum['ravine loss at lr 0.01']:.1e} against "
            f"{adamw['ravine loss at lr 0.01']:.1e}: one rate does not mean one speed",
        ),
        Verdict(
            "Adagrad's steps die out",
            _truth(abs(p["adagrad"] + 0.5) < 0.1),
            f"under constant gradient noise their size falls as t^{p['adagrad']:.2f}",
        ),
        Verdict(
            "RMSprop's do not",
            _truth(abs(p["rmsprop"]) < 0.1),
            f"t^{p['rmsprop']:.2f} (AdamW's: t^{p['adamw']:.2f})",
        ),
        Verdict(
            "L2 in Adam is not decoupled decay",
            _truth(small > 2 * large and abs(same - also) < 0.01),
            f"of a weight under gradients of 0.1 Adam's L2 takes off {small:.0%}, under gradients "
            f"of 10 {large:.0%}; AdamW's decay {same:.0%} and {also:.0%}",
        ),
        Verdict(
            "Lion's step has constant size",
            _truth(lion["smallest"] == lion["largest"] == 1.0),
            f"{lion['smallest']:g} to {lion['largest']:g} lr, for gradients of 1e-6 to 1e6",
        ),
        Verdict(
            "clipping tames a cliff",
            _truth(clipped["highest after it"] < clipped["first"] < free["highest after it"]),
            f"from a loss of {free['first']:.1f}, SGD is thrown up to "
            f"{free['highest after it']:.3g}; clipped at norm 1 it never rises above "
            f"{clipped['highest after it']:.3g}",
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
        pair("SGD with momentum generalises best: a lower validation loss than AdamW's",
             "momentum", "adamw", "validation"),
        pair("its gap is narrower than AdamW's", "momentum", "adamw", "gap"),
        pair("its minimum is flatter than AdamW's", "momentum", "adamw", "sharpness", 1),
        pair("SGD's minimum is flatter than AdamW's", "sgd", "adamw", "sharpness", 1),
        Verdict(
            f"{name}: warm-up narrows AdamW's gap",
            compare(warm, cold),
            f"with {shown(warm)}, without {shown(cold)}",
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
            f"{name}: Lion holds half of AdamW's state",
            _truth(abs(memory["lion"] / memory["adamw"] - 0.5) < 0.05),
            f"{memory['lion']:.2f} and {memory['adamw']:.2f} bytes a parameter",
        ),
    ]  # fmt: skip
