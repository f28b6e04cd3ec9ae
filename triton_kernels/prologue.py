"""The kernels that run before a sweep, in float64 on the device.

judge decides on a step (:mod:`onepass.numerics.verdict`), and advance derives a row of the
hyperparameter table from each row of options. Both have the IEEE operations of the reference in the
same order, and therefore the same bits.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from onepass.rules import Rule

from .. import rules as rule_table
from ..numerics import verdict as verdict_table
from .rules import advance_of, derive_of
from .table import HYPER_WIDTH, INTERPRETED

# Columns of the options table.
SIGN = tl.constexpr(rule_table.SIGN)
EMA_DECAY = tl.constexpr(rule_table.EMA_DECAY)
OPTIONS_WIDTH = tl.constexpr(rule_table.OPTIONS_WIDTH)

EMA = tl.constexpr(rule_table.EMA)  # column of the hyperparameter table

# Columns of a verdict.
FACTOR = tl.constexpr(verdict_table.FACTOR)
SKIP = tl.constexpr(verdict_table.SKIP)
NORM = tl.constexpr(verdict_table.NORM)
NONFINITE = tl.constexpr(verdict_table.NONFINITE)
SKIPPED = tl.constexpr(verdict_table.SKIPPED)
SCALE = tl.constexpr(verdict_table.SCALE)

TINY = tl.constexpr(verdict_table.TINY)


# --- kernels ---------------------------------------------------------------------------------
# No argument is specialised, neither on its value nor on the alignment of a pointer.


@triton.jit(do_not_specialize=["verdict_ptr", "found_ptr", "scale_ptr", "inf_ptr", "max_norm"])
def judge(
    verdict_ptr, found_ptr, scale_ptr, inf_ptr, max_norm: tl.int64, FOUND: tl.constexpr,
    SCALED: tl.constexpr, ASKED: tl.constexpr, CLIPS: tl.constexpr, LARGEST: tl.constexpr,
    SKIPS: tl.constexpr,
):  # fmt: skip
    """Writes one verdict; launched with one program.

    max_norm holds the bits of a float64, because Triton would pass a float as fp32. FOUND, SCALED
    and ASKED: whether found_ptr, scale_ptr and inf_ptr point to the result of the norm, to the loss
    scale and to found_inf; otherwise the kernel does not read them. CLIPS: whether to clip to
    max_norm. LARGEST: the norm is the largest magnitude. SKIPS: non-finite gradients skip the step.
    """
    zero = tl.full((), 0.0, tl.float64)
    squares, top, nonfinite = zero, zero, zero
    if FOUND:
        squares = tl.load(found_ptr)
        top = tl.load(found_ptr + 1)
        nonfinite = tl.load(found_ptr + 2)
    unit = zero + 1.0
    if SCALED:
        unit = tl.load(scale_ptr).to(tl.float64)
    norm = tl.where(squares == squares, top, squares) if LARGEST else tl.sqrt(squares)
    norm = norm / unit
    coefficient = zero + 1.0
    if CLIPS:
        coefficient = max_norm.to(tl.int64).to(tl.float64, bitcast=True) / (norm + TINY)
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    skip = zero
    if ASKED:
        skip = tl.where(tl.load(inf_ptr) != 0, zero + 1.0, skip)
    if SKIPS:
        skip = tl.where(nonfinite != 0, zero + 1.0, skip)
    tl.store(verdict_ptr + FACTOR, coefficient / unit)
    tl.store(verdict_ptr + SKIP, skip)
    tl.store(verdict_ptr + NORM, norm)
    tl.store(verdict_ptr + NONFINITE, nonfinite)
    tl.store(verdict_ptr + SKIPPED, tl.load(verdict_ptr + SKIPPED) + skip)
    tl.store(verdict_ptr + SCALE, unit)


@triton.jit(
    do_not_specialize=[
        "verdict_ptr", "options_ptr", "kept_ptr", "hyper_ptr", "counters_ptr",
    ]
)  # fmt: skip
def advance(
    verdict_ptr, options_ptr, kept_ptr, hyper_ptr, counters_ptr, ADVANCE: tl.constexpr,
    DERIVE: tl.constexpr, SCALARS: tl.constexpr, SCALAR_STATES: tl.constexpr, JUDGED: tl.constexpr,
):  # fmt: skip
    """Advances one row per program, or sets its step number to 0 if the verdict skips the step.

    ADVANCE and DERIVE are functions of the rule, with SCALARS results of DERIVE and SCALAR_STATES
    scalar states. JUDGED: whether there is a verdict.
    """
    row = tl.program_id(0)
    factor = tl.full((), 1.0, tl.float64)
    skip = tl.full((), 0.0, tl.float64)
    if JUDGED:
        factor = tl.load(verdict_ptr + FACTOR)
        skip = tl.load(verdict_ptr + SKIP)
    number = counters_ptr + row * 2 + 1
    if skip != 0:
        tl.store(number, 0)
    else:
        o = ()
        for i in tl.static_range(OPTIONS_WIDTH):
            o = o + (tl.load(options_ptr + row * OPTIONS_WIDTH + i),)
        rows = tl.num_programs(0)
        taken = tl.load(kept_ptr + row)
        step = taken.to(tl.int64) + 1
        scalar_states = ()
        for i in tl.static_range(SCALAR_STATES):
            scalar_state = tl.load(kept_ptr + (2 + i) * rows + row)
            scalar_states = scalar_states + (scalar_state.to(tl.float64),)
        scalar_states = ADVANCE(o, step, scalar_states)
        scalars = DERIVE(o, step, tl.load(kept_ptr + rows + row) != 0, scalar_states)
        # The columns between those of the rule and those of the average stay zero.
        hyper = hyper_ptr + row * HYPER_WIDTH
        tl.store(hyper, (o[SIGN] * factor).to(tl.float32))
        for i in tl.static_range(SCALARS):
            tl.store(hyper + 1 + i, scalars[i].to(tl.float32))
        tl.store(hyper + EMA, o[EMA_DECAY].to(tl.float32))
        tl.store(hyper + EMA + 1, (1.0 - o[EMA_DECAY]).to(tl.float32))
        tl.store(number, step)
        tl.store(kept_ptr + row, taken + 1.0)
        tl.store(kept_ptr + rows + row, 0.0)
        for i in tl.static_range(SCALAR_STATES):
            tl.store(kept_ptr + (2 + i) * rows + row, scalar_states[i].to(tl.float32))


# One warp per program, because the kernels compute only scalars.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False, "sanitize_overflow": False}


def launch_judge(
    verdict: torch.Tensor,
    found: torch.Tensor | None,
    scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    max_norm: float | None,
    largest: bool,
    skip_nonfinite: bool,
) -> None:
    """Launches judge on the current device and stream.

    See :meth:`onepass.engine.backends.base.Backend.judge` for the arguments.
    """
    (bits,) = struct.unpack("<q", struct.pack("<d", max_norm or 0.0))
    # The interpreter computes with NumPy, which would warn about infinities.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        judge[(1,)](
            verdict,
            verdict if found is None else found,
            verdict if scale is None else scale,
            verdict if found_inf is None else found_inf,
            bits,
            FOUND=found is not None,
            SCALED=scale is not None,
            ASKED=found_inf is not None,
            CLIPS=max_norm is not None,
            LARGEST=largest,
            SKIPS=skip_nonfinite,
            **OPTIONS,
        )


def launch_advance(
    rule: Rule,
    options: torch.Tensor,
    kept: torch.Tensor,
    hyper: torch.Tensor,
    counters: torch.Tensor,
    verdict: torch.Tensor | None,
) -> None:
    """Launches advance on the current device and stream.

    See :meth:`onepass.engine.backends.Backend.advance` for the arguments.
    """
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        advance[(len(options),)](
            options if verdict is None else verdict,
            options,
            kept,
            hyper,
            counters,
            ADVANCE=advance_of(rule),
            DERIVE=derive_of(rule),
            SCALARS=rule.scalars,
            SCALAR_STATES=len(rule.scalar_states),
            JUDGED=verdict is not None,
            **OPTIONS,
        )
