"""Writes comparison.md; all figures in it are generated from the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onepass_tools.compare import verdicts
from onepass_tools.compare.algorithms import ALGORITHMS, BY_KEY
from onepass_tools.compare.line_fit import BATCHES, LR
from onepass_tools.compare.lr_sweep import NEAR, steps_to_target
from onepass_tools.compare.stats import shown
from onepass_tools.compare.surfaces import STEPS, SURFACES
from onepass_tools.demo.report import write_json

HEADINGS = (
    "algorithm",
    "lr",
    "steps to target",
    "train loss",
    "validation loss",
    "gap",
    "state bytes per parameter",
    "decades of lr",
    "sharpness",
)


def rows(task: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table rows of a task, as text."""
    return [
        (
            BY_KEY[key].label,
            f"{row['lr']:.3g}" + (" (edge)" if row["at the edge"] else ""),
            steps_to_target(row["reached"]) + f" (lr {row['fast lr']:.3g})",
            shown(row["train"]),
            shown(row["validation"]),
            shown(row["gap"]),
            f"{row['state bytes']:.2f}",
            f"{row['decades']:.1f}",
            shown(row["sharpness"], 1),
        )
        for key, row in task["rows"].items()
    ]


def markdown(results: dict[str, Any]) -> str:
    """The Markdown page; the plots are in the same folder."""
    about = results["about"]
    out = [
        "# The algorithms compared",
        "",
        f"Written by `{about['command']}`: do not edit. {about['date']}, {about['device']}, "
        f"torch {about['torch']}, commit {about['commit']}; {about['seconds']:.0f} s. "
        "The figures are in [comparison.json](comparison.json).",
        "",
        "± is half a 95 % interval over the seeds (Student's t). Seeds change weights and batches, "
        "the same for every algorithm.",
        "",
        "## What textbooks say, and what was measured",
        "",
        "The claims are those of the usual tables that compare optimizers. *Holds* and "
        "*contradicted* are computed from the figures beside them; *undecided* where intervals "
        "overlap.",
        "",
        "| claim | here | measured |",
        "|---|---|---|",
    ]
    out += [f"| {v.claim} | {v.outcome} | {v.measured} |" for v in verdicts.judge(results)]
    out += [
        "",
        "## A line through points",
        "",
        f"y = 2x + 1 + 0.1 noise at 100 points, `nn.Linear(1, 1)` from weight and bias -1, lr {LR} "
        "for all, 100 steps of all points. The dotted line is the least-squares fit's loss.",
        "",
        "![Loss curves, and the fits](line.png)",
        "",
        f"Below, SGD at lr {LR} with the three choices of `onepass.training.loader`: "
        + "; ".join(BATCHES)
        + " a step. By samples seen, small batches are there sooner, and stay noisy.",
        "",
        "![Batch, mini-batch and stochastic gradient descent](batches.png)",
        "",
        "## Paths over surfaces",
        "",
        f"{STEPS} steps from the same start, each at the rate, out of 19 from 1e-4 to 3, with the "
        "lowest mean loss over the path: the one that was down soonest. No decay, but AdamW's "
        "own 0.01, which moves its goal a little towards the origin.",
        "",
        "![Paths over six surfaces](paths.png)",
        "",
        "![The same, moving](paths.gif)",
        "",
        "| loss above the minimum after the last step (rate) | "
        + " | ".join(s.key for s in SURFACES)
        + " |",
        "|---|" + "---:|" * len(SURFACES),
    ]
    for algorithm in ALGORITHMS:
        cells = [results["paths"][s.key][algorithm.key] for s in SURFACES]
        texts = [f"{_loss(c['last'])} ({c['lr']:.2g})" for c in cells]
        out.append(f"| {algorithm.label} | " + " | ".join(texts) + " |")
    out += [
        "",
        "## Small models",
        "",
        "Minutes on a CPU: what is seen here need not hold for large models and long runs.",
        "",
    ]
    for name, task in results["tasks"].items():
        out += [
            f"### {name}",
            "",
            f"{task['about']}. {task['steps']} steps, warm-up over the first tenth, then cosine to "
            f"zero, clipped at norm 1; {task['seeds']} seeds. Losses in {task['unit']}. The rate "
            f"is the best of a sweep with {task['sweep seeds']} of them, by validation loss; *edge*"
            " where that is its first or last.",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|---|" + "---:|" * (len(HEADINGS) - 1),
        ]
        out += ["| " + " | ".join(row) + " |" for row in rows(task)]
        out += [""]
    decays = ", ".join(f"{a.label} {a.decay:g}" for a in ALGORITHMS if a.decay != 1e-4)
    out += [
        "Steps to target: until the mean training loss of ten steps is below "
        + ", ".join(f"{task['target']:g} ({name})" for name, task in results["tasks"].items())
        + ", at the rate of the sweep that is there soonest. Gap: validation minus train loss. "
        "Decades of lr: of those swept, how many end "
        f"within {NEAR:g} of the algorithm's best training loss; more is less sensitive. "
        "Sharpness: the largest eigenvalue of the Hessian of the training loss, by 20 power "
        f"iterations. Weight decay: {decays} decoupled, 0.0001 added to the gradient for the rest.",
        "",
        "![Training losses, sweeps, gaps and sharpness](models.png)",
        "",
    ]
    return "\n".join(out)


def _loss(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "diverged"
    return "< 1e-12" if value < 1e-12 else f"{value:.1e}"


def write(out: Path, results: dict[str, Any]) -> None:
    """Writes comparison.json, then comparison.md from the content of that file."""
    write_json(out / "comparison.json", results)
    again = json.loads((out / "comparison.json").read_text("utf-8"))
    (out / "comparison.md").write_text(markdown(again), "utf-8")
