"""The sweep: one kernel that updates the whole parameter list in one pass.

A program takes one chunk: a contiguous part of one parameter, described by a row of the chunk
table. It decodes the elements, applies the rule and encodes the results. The rule and the formats
are compile-time functions. Every number that can change from step to step is read from a table in
device memory, so that no step recompiles the kernel. A list that mixes flags, dtypes or formats is
compiled into one kernel with one branch per variant; all threads of a program take the same branch.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from onepass.engine.backends.base import StepArgs

from .. import rules as rule_table
from . import formats
from .access import (
    load,
    load_stored,
    only_elements,
    record_changes,
    store,
    store_stored,
)
from .sums import leave_sums, measure, no_sums, total_telemetry
from .table import (
    AVERAGE,
    CHANGED,
    COLUMNS,
    COMPANION,
    COUNT,
    ENTRY,
    HYPER_WIDTH,
    INDEX,
    INTERPRETED,
    PARAM,
    PARAM_ID,
    ROW,
    SCALES,
    START,
    STATES,
    VARIANT,
    Tuning,
)
from .variants import Variant as Variant
from .variants import (
    Variants,
    has_slot,
    root_slot,
    state_bits,
    state_format,
    variant_at,
    weight_bits,
)

EMA = tl.constexpr(rule_table.EMA)


@triton.jit
def unit_root(root):
    """The unit of relative first moments: the root of the second moment, or 1 where it is zero."""
    return tl.where(root == 0, 1.0, root)


@triton.jit
def bits_from(words, POSITION: tl.constexpr):
    """The 16 random bits of each element for one use; see onepass.numerics.random_bits."""
    return (words[POSITION // 32] >> (POSITION % 32)) & 0xFFFF


@triton.jit
def store_state(
    at, states, words, root, first, count, maps, V: tl.constexpr, SLOT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Encodes and stores the state of a slot; returns the root for the states that follow."""
    FORMAT: tl.constexpr = state_format(V, SLOT)
    ROOT: tl.constexpr = root_slot(V)
    _, _, _, _, _, states_at, scales_at = at
    BITS: tl.constexpr = state_bits(SLOT)
    random = bits_from(words, BITS)
    values = only_elements(states[SLOT], first, count, FORMAT, FULL)
    codes, extra = FORMAT.encode(values, random, root, maps)
    store_stored(states_at[SLOT], scales_at[SLOT], first, count, codes, extra, FORMAT, BLOCK, FULL)
    if SLOT == ROOT:
        root = unit_root(FORMAT.root(codes, extra))
    return root


@triton.jit
def end_block(
    at, grad, before, after, sums, first, count, V: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, ZERO: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """The optional work on a block, also on a block of a skipped step.

    ZERO sets the gradient to zero. MEASURED adds the gradient, and the weight before and after the
    step, to the telemetry sums.
    """
    _, _, grad_at, _, _, _, _ = at
    lanes = tl.arange(0, BLOCK)
    if MEASURED:
        if not FULL:
            # Past the end, the result of a rule may be nonzero although its inputs are zero.
            after = tl.where(first + lanes < count, after, 0.0)
        sums = measure(sums, grad, before, after)
    if ZERO:
        ELEMENT: tl.constexpr = V.grad_format.element
        store(grad_at, first, lanes, count, tl.zeros([BLOCK], ELEMENT), ELEMENT, FULL)
    return sums


@triton.jit
def leave_block(
    at, sums, first, count, maps, V: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr,
    MEASURED: tl.constexpr,
):  # fmt: skip
    """Handles a block of a skipped step: only its gradient may be zeroed, and telemetry added."""
    param_at, companion_at, grad_at, _, _, _, _ = at
    PARAM: tl.constexpr = V.param_format
    GRAD: tl.constexpr = V.grad_format
    # The compiler removes loads whose results are unused.
    codes, extra = load_stored(param_at, companion_at, first, count, PARAM, BLOCK, False)
    param = PARAM.decode(codes, extra, 0, maps)
    codes, extra = load_stored(grad_at, grad_at, first, count, GRAD, BLOCK, False)
    grad = GRAD.decode(codes, extra, 0, maps)
    return end_block(
        at, grad, param, param, sums, first, count, V, BLOCK, False, ZERO, MEASURED
    )  # fmt: skip


@triton.jit
def sweep_block(
    at, h, average_h, stream, index, sums, first, count, maps, V: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, ZERO: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Updates one block: decodes, applies the rule, encodes.

    FULL: the accesses need no mask, and every address is a multiple of 16.
    """
    param_at, companion_at, grad_at, average_at, changed_at, states_at, scales_at = at
    SLOTS: tl.constexpr = V.slots
    PARAM: tl.constexpr = V.param_format
    GRAD: tl.constexpr = V.grad_format
    ROOT: tl.constexpr = root_slot(V)
    codes, extra = load_stored(param_at, companion_at, first, count, PARAM, BLOCK, FULL)
    before = PARAM.decode(codes, extra, 0, maps)
    weight_codes = codes
    codes, extra = load_stored(grad_at, grad_at, first, count, GRAD, BLOCK, FULL)
    raw = GRAD.decode(codes, extra, 0, maps)
    # The second moment is decoded first, because its root is the unit of the relative moments.
    root = before
    if ROOT is not None:
        S: tl.constexpr = state_format(V, ROOT)
        codes, extra = load_stored(states_at[ROOT], scales_at[ROOT], first, count, S, BLOCK, FULL)
        root = unit_root(S.root(codes, extra))
        second = S.decode(codes, extra, root, maps)
    states = ()
    for slot in tl.static_range(SLOTS):
        if not has_slot(V, slot):
            # A stand-in that no rule reads: Triton's tuples cannot hold None.
            states = states + (before,)
        elif slot == ROOT:
            states = states + (second,)
        else:
            codes, extra = load_stored(
                states_at[slot], scales_at[slot], first, count, state_format(V, slot), BLOCK, FULL
            )
            states = states + (state_format(V, slot).decode(codes, extra, root, maps),)
    param, states = V.update(before, h[0] * raw, states, h[1:], V.update_flags)
    if V.ema:
        # The average takes the weight before it is rounded to its format.
        lanes = tl.arange(0, BLOCK)
        average = load(average_at, first, lanes, count, tl.float32, FULL)
        average = average_h[0] * average + average_h[1] * param
        store(average_at, first, lanes, count, average, tl.float32, FULL)
    words = (0, 0, 0)
    if V.stochastic:
        # The compiler removes the words that no format draws from.
        offsets = first + tl.arange(0, BLOCK)
        words = (
            formats.random_bits(stream, index, offsets, 0),
            formats.random_bits(stream, index, offsets, 1),
            formats.random_bits(stream, index, offsets, 2),
        )
    BITS: tl.constexpr = weight_bits(V)
    codes, extra = PARAM.encode(param, bits_from(words, BITS), 0, maps)
    store_stored(param_at, companion_at, first, count, codes, extra, PARAM, BLOCK, FULL)
    if V.changed:
        record_changes(
            changed_at, first, count, weight_codes, codes, PARAM.element, BLOCK, FULL
        )  # fmt: skip
    if ROOT is not None:
        root = store_state(at, states, words, root, first, count, maps, V, ROOT, BLOCK, FULL)
    for slot in tl.static_range(SLOTS):
        if has_slot(V, slot) and slot != ROOT:
            store_state(at, states, words, root, first, count, maps, V, slot, BLOCK, FULL)
    return end_block(
        at, raw, before, param, sums, first, count, V, BLOCK, FULL, ZERO, MEASURED
    )  # fmt: skip


@triton.jit
def sweep_chunk(
    chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, partials_ptr, V: tl.constexpr,
    BLOCK: tl.constexpr, ZERO: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Updates one chunk: full blocks without a mask if all tensors are aligned, else masked."""
    SLOTS: tl.constexpr = V.slots
    SCALARS: tl.constexpr = V.scalars
    SIZE: tl.constexpr = BLOCK * V.blocks
    start = tl.load(chunk + START)
    count = tl.load(chunk + COUNT).to(tl.int32)
    row = tl.load(chunk + ROW)
    index = tl.load(chunk + INDEX)
    param_at = tl.load(chunk + PARAM)
    grad_at = tl.load(grads_ptr + tl.load(chunk + ENTRY))
    grad_at += start * (V.grad_format.element.primitive_bitwidth // 8)
    companion_at = tl.load(chunk + COMPANION)
    # The address of a tensor that the variant does not have is 0.
    misaligned = param_at | grad_at | companion_at
    average_at = param_at
    if V.ema:
        average_at = tl.load(chunk + AVERAGE)
        misaligned |= average_at
    changed_at = param_at
    if V.changed:
        changed_at = tl.load(chunk + CHANGED)
    states_at, scales_at = (), ()
    for slot in tl.static_range(SLOTS):
        state_at = tl.load(chunk + STATES + slot)
        misaligned |= state_at
        states_at = states_at + (state_at,)
        scales_at = scales_at + (tl.load(chunk + SCALES + slot),)
    at = (param_at, companion_at, grad_at, average_at, changed_at, states_at, scales_at)
    h = ()
    for i in tl.static_range(SCALARS + 1):
        h = h + (tl.load(hyper_ptr + row * HYPER_WIDTH + i),)
    average_h = ()
    if V.ema:
        average_h = (
            tl.load(hyper_ptr + row * HYPER_WIDTH + EMA),
            tl.load(hyper_ptr + row * HYPER_WIDTH + EMA + 1),
        )
    step = tl.load(counters_ptr + row * 2 + 1)
    stream = index
    if V.stochastic:
        stream = formats.random_stream(
            tl.load(counters_ptr + row * 2), step, tl.load(chunk + PARAM_ID)
        )
    sums = ()
    if MEASURED:
        sums = no_sums()
    # Step number 0 skips the row: none of its elements is updated.
    alone = tl.where(step == 0, count, 0)
    count -= alone
    whole = tl.where(misaligned % 16 == 0, count // SIZE * SIZE, 0)
    for first in range(0, whole, SIZE):
        sums = sweep_block(
            at, h, average_h, stream, index, sums, first, count, maps_ptr, V, SIZE, True, ZERO,
            MEASURED,
        )  # fmt: skip
    for first in range(whole, count, BLOCK):
        sums = sweep_block(
            at, h, average_h, stream, index, sums, first, count, maps_ptr, V, BLOCK, False, ZERO,
            MEASURED,
        )  # fmt: skip
    if ZERO or MEASURED:
        for first in range(0, alone, BLOCK):
            sums = leave_block(at, sums, first, alone, maps_ptr, V, BLOCK, ZERO, MEASURED)
    if MEASURED:
        leave_sums(sums, partials_ptr)


@triton.jit
def sweep(
    chunks_ptr, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, partials_ptr, VARIANTS: tl.constexpr,
    BLOCK: tl.constexpr, ZERO: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """One step over the chunk table; the grid has one program per chunk.

    Parameters, states and averages are updated in place. Gradients are only read, unless ZERO sets
    them to zero. MEASURED: each program writes its partial telemetry to partials_ptr.
    """
    NUM_VARIANTS: tl.constexpr = VARIANTS.count
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    if NUM_VARIANTS == 1:
        sweep_chunk(
            chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, partials_ptr,
            variant_at(VARIANTS, 0), BLOCK, ZERO, MEASURED,
        )  # fmt: skip
    else:
        variant = tl.load(chunk + VARIANT)
        for v in tl.static_range(NUM_VARIANTS):
            if variant == v:
                sweep_chunk(
                    chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, partials_ptr,
                    variant_at(VARIANTS, v), BLOCK, ZERO, MEASURED,
                )  # fmt: skip


def launch(
    chunks: torch.Tensor,
    grads: torch.Tensor,
    maps: torch.Tensor,
    variants: Variants,
    tuned: Tuning,
    spans: torch.Tensor,
    step: StepArgs,
) -> None:
    """Launches the sweep over all chunks on the current device and stream.

    Args:
        chunks: int64 [chunks, COLUMNS], the chunk table; its addresses must be valid on the device.
        grads: int64 [entries], the addresses of the gradients.
        maps: fp32 [2, words], the tables of :data:`onepass.triton_kernels.blocks.DYNAMIC_MAPS`; the
            cells have the bits of integers.
        variants: the variants that the column VARIANT of chunks refers to.
        tuned: the launch shape.
        spans: int64 [rows, 2]; see total_telemetry, which is launched after the sweep if
            step.telemetry is set.
        step: see :class:`onepass.engine.backends.base.StepArgs`.
    """
    partials, telemetry = maps, step.telemetry
    if telemetry is not None:
        partials = torch.empty(len(chunks), 4, dtype=torch.float64, device=chunks.device)
    # The interpreter computes with NumPy, which would warn about every overflow.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        sweep[(len(chunks),)](
            chunks,
            grads,
            step.hyper,
            step.counters,
            maps,
            partials,
            VARIANTS=variants,
            BLOCK=tuned.block,
            ZERO=step.switches.zero_grads,
            MEASURED=telemetry is not None,
            **tuned.options(variants.limited, variants.small_recording),
        )
        if telemetry is not None:
            total_telemetry[(len(telemetry),)](
                partials, chunks, spans, telemetry, **tuned.options()
            )
