"""``python -m bench.training_study``: how each part of a 4-bit format affects training.

Uses the model, data and seeds of :mod:`bench.training`, with fp32 weights and gradients. AdamW is
implemented here. Between steps, its averages (moments) are exact, or encoded and decoded by a
codec: one of onepass.formats, or an alternative to it. Each finished run appends one line to
bench/results/training_study.jsonl; runs that already have a line are skipped. ``--report`` writes
docs/training-mx4.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onepass.formats import mx4, mx8
from onepass.formats.block_scales import MX_BLOCK, decode_signed, encode_signed
from onepass.numerics.arrays import F32, U32
from onepass_tools.demo.data import Corpus, load
from onepass_tools.demo.model import Shape, initial_weights, parameter_groups
from onepass_tools.demo.train import backward, schedule, validate

from . import results, training_study_report
from .results import Line
from .runs import Run, add_arguments, check_arguments, run_missing
from .training import FULL, RULES, Compared, Size, step_of, task_of

OUT = results.ROOT / "bench" / "results" / "training_study.jsonl"
TINY = Size(Shape(16, 32, 1, 2), 4, 6, 2, 400_000, 2)


class Nearest:
    """Replaces a random generator: always returns the middle, which rounds to nearest."""

    def integers(self, low: int, high: int, count: int, dtype: type) -> U32:
        """``count`` times half of ``high``."""
        return np.full(count, high // 2, np.uint32)


class Even:
    """Replaces a random generator: 16-bit numbers that are spread evenly over the steps.

    The numbers of an element are a Weyl sequence of the golden ratio with a random start. In each
    step the numbers are uniform over the elements. Over a few steps, those of one element are
    spread more evenly than random ones, so that rounding errors cancel.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._steps = seed, 0

    def integers(self, low: int, high: int, count: int, dtype: type) -> U32:
        """The numbers of the next step; ``low`` and ``high`` must be 0 and 65536."""
        start = np.random.default_rng(self._seed).integers(low, high, count, dtype=np.uint32)
        self._steps += 1
        found: U32 = (start + np.uint32(self._steps * 40503 & 0xFFFF)) & np.uint32(0xFFFF)
        return found


Random = Any  # np.random.Generator, or one of the classes above for codecs that use 16-bit numbers
Code = Callable[[F32, Random], F32]
"""(values, random) -> the values, encoded and decoded."""
FirstCode = Callable[[F32, F32, Random], F32]
"""(first moment, square root of the decoded second moment, random) -> the first moment, encoded and
decoded."""


def _bits(random: Random, count: int) -> U32:
    found: U32 = random.integers(0, 1 << 16, count, dtype=np.uint32)
    return found


def root_e3m1(v: F32, random: Random) -> F32:
    """The second moment in version 1 of mx4: its square root in E3M1, rounded stochastically."""
    codes, scale = mx4.encode_positive(np.sqrt(v), _bits(random, len(v)))
    root = mx4.decode_positive(codes, scale)
    return root * root


def root_e2m2(v: F32, random: Random) -> F32:
    """The second moment in the current mx4: E2M2 for blocks whose values fit its range."""
    root = mx4.decode_root(*mx4.encode_root(np.sqrt(v), _bits(random, len(v))))
    return root * root


def second_mx8(v: F32, random: Random) -> F32:
    """The second moment in mx8."""
    return mx8.decode_unsigned(*mx8.encode_unsigned(v, _bits(random, len(v))))


def first_mx8(m: F32, root: F32, random: Random) -> F32:
    """The first moment in mx8."""
    codes, scale = encode_signed(m, _bits(random, len(m)), mx8.E4M3)
    return decode_signed(codes, scale, mx8.E4M3)


def floored(v: F32, random: Random) -> F32:
    """The exact second moment, but at least the lowest code of mx4 in the block."""
    codes, scale = mx4.encode_positive(np.sqrt(v), np.zeros(len(v), np.uint32))
    lowest = mx4.decode_positive(np.zeros_like(codes), scale)
    return np.maximum(v, lowest * lowest)


def powers_of_two(v: F32, random: Random, log: bool) -> F32:
    """The second moment as one of the 16 powers of two up to the largest of the block.

    Args:
        v: the second moment.
        random: the generator.
        log: whether the probability of rounding up makes the mean of log v exact, instead of that
            of v.
    """
    grid = np.pad(v, (0, -len(v) % MX_BLOCK)).reshape(-1, MX_BLOCK)
    top = np.ceil(np.log2(np.maximum(grid.max(1, keepdims=True), 1e-37)))
    held = np.maximum(grid, np.exp2(top - 15))
    exponent = np.floor(np.log2(held))
    part = np.log2(held) - exponent if log else held / np.exp2(exponent) - 1
    up = random.random(grid.shape) < part
    found = np.where(grid.max(1, keepdims=True) > 0, np.exp2(exponent + up), 0)
    return np.asarray(found.reshape(-1)[: len(v)], np.float32)


def root_log(v: F32, random: Random) -> F32:
    """The codes of :func:`root_e3m1`, rounded up with a probability that makes the mean of log v
    exact."""
    root = np.sqrt(v)
    nothing = np.zeros(len(v), np.uint32)
    codes, scale = mx4.encode_positive(root, nothing)
    below = mx4.decode_positive(codes, scale)
    above = np.where(codes % 2 == 0, below * np.float32(1.5), below * np.float32(4 / 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.log(root / below) / np.log(above / below)
    up = _bits(random, len(v)) < part * 65536
    chosen = np.where(up, above, below).astype(np.float32)
    return chosen * chosen


def ratio_e2m1(m: F32, root: F32, random: Random) -> F32:
    """The first moment in version 1 of mx4: its ratio to the root of the second, in E2M1."""
    divisor = np.where(root == 0, np.float32(1), root)
    codes, scale = encode_signed(mx4.ratio(m, divisor), _bits(random, len(m)), mx4.E2M1)
    return decode_signed(codes, scale, mx4.E2M1) * divisor


def ratio_even(m: F32, root: F32, random: Random, size: int = 32, dithered: bool = False) -> F32:
    """The first moment as a ratio in 15 evenly spaced codes, with a scale in fp32 for each block.

    Args:
        m: the first moment.
        root: square root of the decoded second moment.
        random: the generator.
        size: elements per block.
        dithered: whether the random number that is added before rounding is subtracted again after
            decoding, which is possible because the random bits can be recomputed. The error is then
            uniform for every value, and has half the variance on average (Schuchman, "Dither
            signals and their effect on quantization noise", 1964). Zero stays zero: it has the
            sixteenth code.
    """
    divisor = np.where(root == 0, np.float32(1), root)
    unit = mx4.ratio(m, divisor)
    grid = np.pad(unit, (0, -len(unit) % size)).reshape(-1, size)
    step = np.maximum(np.abs(grid).max(1, keepdims=True) / 7, np.float32(1e-30))
    dither = random.random(grid.shape, dtype=np.float32)
    code = np.floor(grid / step + dither)
    if dithered:
        code = np.where(grid == 0, 0, code + np.float32(0.5) - dither)
    return np.asarray((code * step).reshape(-1)[: len(m)] * divisor, np.float32)


SECOND: dict[str, Code] = {
    "mx4": root_e3m1,
    "mx8": second_mx8,
    "E2M2": root_e2m2,
    "floored": floored,
    "root, log": root_log,
    "2^k": lambda v, random: powers_of_two(v, random, log=False),
    "2^k, log": lambda v, random: powers_of_two(v, random, log=True),
}
FIRST: dict[str, FirstCode] = {
    "mx4": ratio_e2m1,
    "mx8": first_mx8,
    "nearest": lambda m, root, random: ratio_e2m1(m, root, Nearest()),
    "even": ratio_even,
    "even 16": lambda m, root, random: ratio_even(m, root, random, 16),
    "dithered": lambda m, root, random: ratio_even(m, root, random, dithered=True),
}


@dataclass(frozen=True)
class Variant:
    """The differences of a run from fp32 training.

    Attributes:
        name: the name for ``--variants``, in the result lines and on the page.
        lr: factor of the learning rate.
        noise: rms of normal noise that is added to each step, divided by the rms of the step.
        memory: correlation of this noise from one step to the next.
        even: whether the random bits of an element are spread evenly over the steps.
        first, second: codec of the first and second moment between steps; "" for none.
    """

    name: str
    lr: float = 1.0
    noise: float = 0.0
    memory: float = 0.0
    even: bool = False
    first: str = ""
    second: str = ""


VARIANTS = (
    Variant("fp32"),
    Variant("fp32, lr / 1.3", lr=1 / 1.3),
    Variant("fp32, lr / 1.17", lr=1 / 1.17),
    Variant("fp32, lr x 1.03", lr=1.03),
    Variant("fp32, lr x 1.17", lr=1.17),
    Variant("fp32, lr x 1.3", lr=1.3),
    Variant("fp32, noise 0.1", noise=0.1),
    Variant("fp32, noise 0.5", noise=0.5),
    Variant("fp32, noise 0.4 with memory 0.9", noise=0.4, memory=0.9),
    Variant("mx8", first="mx8", second="mx8"),
    Variant("mx4", first="mx4", second="mx4"),
    Variant("mx4, lr / 1.03", lr=1 / 1.03, first="mx4", second="mx4"),
    Variant("mx4, lr / 1.17", lr=1 / 1.17, first="mx4", second="mx4"),
    Variant("first moment only", first="mx4"),
    Variant("second moment only", second="mx4"),
    Variant("second moment floored only", second="floored"),
    Variant("second: log v right", first="mx4", second="root, log"),
    Variant("second: 2^k, v right", first="mx4", second="2^k"),
    Variant("second: 2^k, log v right", first="mx4", second="2^k, log"),
    Variant("bits spread evenly over steps", even=True, first="mx4", second="mx4"),
    Variant("bits spread evenly, log v right", even=True, first="mx4", second="root, log"),
    Variant("first: nearest", first="nearest", second="mx4"),
    Variant("first: 15 even codes", first="even", second="mx4"),
    Variant("first: 15 even codes, blocks of 16", first="even 16", second="mx4"),
    Variant("second: E2M2 where it fits", first="mx4", second="E2M2"),
    Variant("first: 15 even codes, second: E2M2", first="even", second="E2M2"),
    Variant("first: dithered, second: E2M2", first="dithered", second="E2M2"),
)


def settings(variant: Variant, size: Size) -> Line:
    """Everything that the result of a run depends on except the seed and the machine."""
    return {"variant": asdict(variant), "adamw": RULES["adamw"], **asdict(size)}


def train(variant: Variant, size: Size, seed: int, corpus: Corpus) -> Line:
    """Trains one run; returns the validation loss and the comparison with exact averages."""
    began = time.perf_counter()
    task = task_of(size, seed, corpus, initial_weights(size.shape, seed))
    model = task.model()
    options = RULES["adamw"]
    groups = parameter_groups(model, options["weight_decay"])
    # This optimizer only holds the learning rate schedule; the steps are computed below.
    schedules = torch.optim.SGD(groups, lr=options["lr"] * variant.lr)
    scheduler = schedule(schedules, size.steps)
    params: list[Tensor] = [p for group in schedules.param_groups for p in group["params"]]
    sizes = [p.numel() for p in params]
    if any(count % MX_BLOCK for count in sizes):
        raise ValueError(
            f"the size of every parameter must be a multiple of {MX_BLOCK}, so that no block spans "
            f"two parameters; got {sizes}"
        )
    decay = torch.cat(
        [
            torch.full((p.numel(),), float(group["weight_decay"]))
            for group in schedules.param_groups
            for p in group["params"]
        ]
    )
    held, exact = ([torch.zeros(sum(sizes)) for _ in range(2)] for _ in range(2))
    randoms: list[Random] = (
        [Even(2 * seed), Even(2 * seed + 1)]
        if variant.even
        else [np.random.default_rng((seed, slot)) for slot in range(2)]
    )
    noise = torch.Generator().manual_seed(seed)
    wander = torch.zeros(sum(sizes))
    compared = Compared()

    for t in range(1, size.steps + 1):
        backward(task, model, t - 1)
        grad = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        u, held = step_of("adamw", held, grad, t)
        of_exact, exact = step_of("adamw", exact, grad, t)
        if variant.noise:
            scale = variant.noise * u.square().mean().sqrt()
            fresh = torch.randn(u.shape, generator=noise)
            fade = variant.memory
            wander = fresh if t == 1 else fade * wander + (1 - fade**2) ** 0.5 * fresh
            u += scale * wander
        if t % size.sampled == 0:
            compared.add(u, of_exact)
        lr = schedules.param_groups[0]["lr"]
        with torch.no_grad():
            weights = torch.cat([p.reshape(-1) for p in params])
            weights -= lr * (u + decay * weights)
            for param, part in zip(params, torch.split(weights, sizes), strict=True):
                param.copy_(part.view_as(param))
        if variant.second:
            held[1] = torch.from_numpy(SECOND[variant.second](held[1].numpy(), randoms[1]))
        if variant.first:
            root = held[1].sqrt().numpy()
            held[0] = torch.from_numpy(FIRST[variant.first](held[0].numpy(), root, randoms[0]))
        model.zero_grad()
        schedules.step()  # has no gradients: the scheduler requires a step() before its own
        scheduler.step()
    return {
        "validation_loss": validate(task, model),
        **compared.line(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains the missing runs, or writes the page.

    Returns:
        0 on success; 2 on wrong usage or if there is nothing to report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_study",
        description="Trains a small GPT with parts and variants of the 4-bit state format.",
    )
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--report", action="store_true", help="write docs/training-mx4.md and stop")
    add_arguments(parser, "--variants", names, OUT, seeds=3)
    args = parser.parse_args(argv)
    if args.report:
        return training_study_report.write(args.out, results.ROOT / "docs", names)
    check_arguments(parser, args)
    size = TINY if args.quick else FULL
    corpus = load(size.corpus_bytes)

    def run(variant: Variant) -> Run:
        return Run(
            variant.name, settings(variant, size), lambda seed: train(variant, size, seed, corpus)
        )

    run_missing(args, "study", [run(variant) for variant in VARIANTS], _shown)
    return 0


def _shown(line: Line) -> str:
    return (
        f"rms u {line['rms_u']:.4f}  over exact {line['rms_u'] / line['rms_u_exact']:.3f}  "
        f"projection {line['projection']:.3f}  signs {line['signs_differ']:.3f}  "
        f"max {line['max_u']:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
