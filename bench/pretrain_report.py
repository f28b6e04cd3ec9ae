"""docs/pretrain.md and docs/pretrain.png from the lines of ``python -m bench.pretrain``."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from onepass_tools.compare.stats import interval

from . import results
from .pretrain_configs import BASELINE, CONFIGS
from .results import Line
from .training_report import by_config, newest

GIB = 1 << 30
# The colours of Okabe and Ito, which colour-blind readers can distinguish. The curves nearly
# coincide, so narrow lines are drawn on top of wide ones.
STYLES: dict[str, tuple[str, str, float]] = {
    "torch-fused": ("#E69F00", "-", 5.0),
    "onepass-fp32": ("#000000", "--", 1.1),
    "onepass-split8-mx8": ("#0072B2", "-", 2.8),
    "onepass-stochastic-mx4": ("#009E73", "-.", 1.9),
    "bitsandbytes-8bit": ("#CC79A7", ":", 1.7),
}
Runs = Mapping[str, Mapping[int, Line]]
"""Lines by configuration and seed."""


def sections(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in comparable groups: each from one machine and with the same work.

    The group with the newest line comes first; configurations are in the order of CONFIGS.
    """
    order = {config.name: i for i, config in enumerate(CONFIGS)}
    own = {"name", "library", "dtype", "weights", "states"}
    groups: dict[str, list[Line]] = {}
    for line in lines:
        common = {name: value for name, value in line["settings"].items() if name not in own}
        key = json.dumps([line["device"], common], sort_keys=True)
        groups.setdefault(key, []).append(line)
    for group in groups.values():
        group.sort(key=lambda line: (order.get(line["settings"]["name"], len(order)), line["seed"]))
    return sorted(groups.values(), key=lambda group: max(x["date"] for x in group), reverse=True)


def difference(own: Mapping[int, Line], base: Mapping[int, Line]) -> tuple[float, float] | None:
    """The final validation loss minus that of the baseline with the same seeds.

    Returns:
        The mean and half the width of the 95 % interval (paired t), which is NaN with fewer than
        two common seeds; None without a common seed.
    """
    seeds = sorted(own.keys() & base.keys())
    if not seeds:
        return None
    return interval([own[s]["validation_loss"] - base[s]["validation_loss"] for s in seeds])


def _mean(own: Mapping[int, Line], field: str, form: str, unit: float = 1.0) -> str:
    """The mean over the seeds, formatted; a dash if the field was not measured."""
    values = [line[field] for line in own.values()]
    if any(value is None for value in values):
        return "–"
    return format(statistics.fmean(values) / unit, form)


def table(runs: Runs) -> list[str]:
    """One row per configuration, as Markdown."""
    heads = (
        "configuration",
        "bytes per parameter",
        "seeds",
        "final validation loss",
        f"minus `{BASELINE}`",
        "tokens/s",
        "peak memory, GiB",
        "held between steps, GiB",
        "optimizer step, ms",
        "optimizer share",
    )
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, own in runs.items():
        apart = difference(own, runs.get(BASELINE, {}))
        shown = "–"
        if name != BASELINE and apart is not None:
            half = "" if math.isnan(apart[1]) else f" ± {apart[1]:.4f}"
            shown = f"{round(apart[0], 4) + 0.0:+.4f}{half}"  # not -0.0000
        cells = [
            f"`{name}`",
            _mean(own, "bytes_per_parameter", ".2f"),
            str(len(own)),
            _mean(own, "validation_loss", ".4f"),
            shown,
            _mean(own, "tokens_per_second", ",.0f"),
            _mean(own, "peak_bytes", ".2f", GIB),
            _mean(own, "held_bytes", ".2f", GIB),
            _mean(own, "optimizer_ms", ".3f"),
            _mean(own, "optimizer_share", ".2%"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _setup(section: Sequence[Line]) -> str:
    """What was trained, in words."""
    one = section[0]
    s, shape = one["settings"], one["settings"]["shape"]
    tokens = s["steps"] * s["batch"] * shape["context"]
    return (
        f"A GPT-2 of {one['parameters']:,} parameters: {shape['depth']} layers, {shape['heads']} "
        f"heads, width {shape['width']}, context {shape['context']}, and an embedding of "
        f"{s['vocabulary']:,} rows that is also the output layer. Tokens are bytes, so the text "
        f"uses 256 rows. Training takes {s['steps']:,} steps of {s['batch']} windows "
        f"({tokens / 1e6:.3g} M tokens, {tokens / s['train_bytes']:.2g} times the text). The text "
        f"is the standard library of {s['text']}; validation uses "
        f"{s['validation_batches'] * s['batch']} windows of files that are not trained on. AdamW: "
        f"lr {s['lr']:g}, betas {tuple(s['betas'])}, eps {s['eps']:g}, weight decay "
        f"{s['weight_decay']:g} on matrices and embeddings. The learning rate warms up over a "
        f"tenth of the steps, then follows a cosine to {s['final_lr']:g} of the peak. Gradients "
        f"are clipped to a norm of {s['max_grad_norm']:g}."
    )


def _origins(section: Sequence[Line]) -> str:
    """The dates and versions of the lines, in words."""
    dates = sorted(line["date"] for line in section)
    found = sorted({results.origin(line).partition(", ")[2] for line in section})
    libraries = sorted({f"{x['provider']} {x['provider_version']}" for x in section})
    return (
        f"Measured {dates[0]} to {dates[-1]}: {'; '.join(found)}. Providers: "
        f"{', '.join(libraries)}."
    )


def _coverage(section: Sequence[Line], runs: Runs) -> str:
    """What was and what was not measured, in words."""
    seeds = sorted({line["seed"] for line in section})
    missing = [f"`{config.name}`" for config in CONFIGS if config.name not in runs]
    text = [
        f"Measured: {', '.join(f'`{name}`' for name in runs)}, with "
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, on this device only."
    ]
    if len(seeds) == 1:
        text.append(
            "One seed does not show the variation between seeds: a difference may be chance."
        )
    if section[0]["peak_bytes"] is None:
        text.append("Memory is measured on a GPU only.")
    else:
        text.append(
            "The backward pass of attention on a GPU is not deterministic, so two runs of the same "
            "configuration differ too."
        )
    not_measured = [
        *missing,
        "several GPUs, torch.compile, tokenized text, other model sizes, longer runs, and rules "
        "other than AdamW",
    ]
    text.append(f"Not measured: {', '.join(not_measured)}.")
    return " ".join(text)


def markdown(lines: Sequence[Line], source: str, picture: str) -> str:
    """The page. lines: those of :func:`bench.training_report.newest`."""
    text = [
        "# Pretraining GPT-2 with each optimizer configuration",
        "",
        f"Generated by `python -m bench.pretrain --report` from {source}: do not edit.",
        "",
        "Every configuration starts from the same fp32 weights, sees the same batches in the same "
        "order, and computes in bf16 under `torch.autocast`.",
        "",
        *[f"- `{config.name}`: {config.label}." for config in CONFIGS],
        "",
        "`split8` stores 8 more bits of each bf16 weight in the optimizer. `stochastic` rounds "
        "each updated weight to one of its two bf16 neighbours at random, so that the mean is "
        "exact. `mx8` and `mx4` store the moments as 8-bit or 4-bit codes with one scale per 32 "
        "values. Norms have fp32 weights and states; all other tensors, including embeddings, use "
        "the formats.",
        "",
        "- **bytes per parameter**: the weight, its gradient, and everything the optimizer stores.",
        "- **final validation loss**: in nats per token after the last step, mean over the seeds. "
        f"**minus `{BASELINE}`**: the mean difference over the same seeds, with a 95 % interval "
        "(paired t) if there are at least two seeds.",
        "- **tokens/s**: from the median time of a training step after warm-up, without "
        "validation.",
        "- **peak memory**: `torch.cuda.max_memory_allocated()` over the run, including "
        "activations. **held between steps**: `torch.cuda.memory_allocated()` after "
        "`zero_grad()`, that is, weights and optimizer states.",
        "- **optimizer step**: the median time of `optimizer.step()`. **optimizer share**: this "
        "time divided by the median time of a training step. `torch.nn.utils.clip_grad_norm_` "
        "clips the gradients of every configuration before the step; the share does not include "
        "its time.",
    ]
    for number, section in enumerate(sections(lines)):
        runs = by_config(section)
        text += ["", f"## {section[0]['device']}, {section[0]['settings']['steps']:,} steps", ""]
        text += [_setup(section), "", *table(runs), ""]
        if number == 0:
            text += [f"![Validation loss over training tokens]({picture})", ""]
        text += [_coverage(section, runs), "", _origins(section)]
    return "\n".join(text) + "\n"


def _curve(own: Mapping[int, Line]) -> tuple[list[float], list[float]]:
    """Training tokens in millions, and the mean validation loss over the seeds at each of them."""
    settings = next(iter(own.values()))["settings"]
    per_step = settings["batch"] * settings["shape"]["context"] / 1e6
    points = [line["validations"] for line in own.values()]
    x = [step * per_step for step, _ in points[0]]
    return x, [statistics.fmean(loss for _, loss in at) for at in zip(*points, strict=True)]


def draw(runs: Runs, path: Path) -> None:
    """Draws the validation loss over the tokens and, below it, its difference from the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8.0, 7.0), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for name, own in runs.items():
        colour, dashes, width = STYLES.get(name, ("#56B4E9", "-", 1.4))
        style = {"color": colour, "linestyle": dashes, "linewidth": width, "marker": "o"}
        style |= {"markersize": width + 1.5, "zorder": 9 - width}
        upper.plot(*_curve(own), label=name, **style)
        base = runs.get(BASELINE, {})
        seeds = own.keys() & base.keys()
        if seeds:
            x, losses = _curve({seed: own[seed] for seed in seeds})
            _, others = _curve({seed: base[seed] for seed in seeds})
            apart = [a - b for a, b in zip(losses, others, strict=True)]
            lower.plot(x, apart, **style)
    upper.set_ylabel("validation loss (nats per token)")
    lower.set_ylabel(f"loss minus that of {BASELINE}")
    lower.set_xlabel("training tokens (millions)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    upper.legend(frameon=False)
    one = next(iter(next(iter(runs.values())).values()))
    upper.set_title(
        f"GPT-2, {one['parameters'] / 1e6:.1f} M parameters, {one['settings']['steps']:,} steps, "
        f"{one['device'].partition(',')[0]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(path: Path, docs: Path) -> int:
    """Write the page and the picture into ``docs``.

    Returns:
        0 on success; 2 if ``path`` has no result lines.
    """
    lines = newest([x for x in results.read_lines(path) if x.get("kind") == "pretrain"])
    if not lines:
        print(
            f"bench.pretrain: no result lines in {path}; run python -m bench.pretrain first",
            file=sys.stderr,
        )
        return 2
    docs.mkdir(parents=True, exist_ok=True)
    draw(by_config(sections(lines)[0]), docs / "pretrain.png")
    root = results.ROOT
    source = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    page = docs / "pretrain.md"
    page.write_text(markdown(lines, source, "pretrain.png"), encoding="utf-8")
    print(f"wrote {page} and {docs / 'pretrain.png'}", file=sys.stderr)
    return 0
