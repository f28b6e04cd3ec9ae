"""Sums of squares: in fp32 within a group of elements, in float64 over the groups.

Float64 runs at 1/64 of the fp32 rate on many GPUs, so a group, which is the elements of one thread,
costs only three float64 operations. The elements are scaled by the power of two that brings their
largest magnitude to between 1/2 and 4, so that no square overflows or underflows. They are squared
and added in fp32; the sum is then scaled back and added to that of the other groups in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import COLUMNS, ROW, THREADS

_INFINITY = tl.constexpr(0x7F800000)

# Chunks whose partial results total_telemetry loads at once.
LAST = tl.constexpr(256)


@triton.jit
def add_squares(squares, values, top):
    """Adds the squares of values, [groups, elements of a group], to squares, float64 [groups].

    top holds the bits of the largest magnitude of each group, NaN ignored.
    """
    # If the largest magnitude of the group is 1.m * 2^e, the scale is 2^(-e-1), but no lower than
    # the smallest normal fp32.
    scale = tl.maximum((253 << 23) - (top & _INFINITY), 1 << 23)
    scaled = values * scale.to(tl.float32, bitcast=True)[:, None]
    group = tl.sum(scaled * scaled, axis=1)
    # 1 / scale^2 as float64; the exponent biases are 127 (fp32) and 1023 (float64).
    unscale = (1023 + 2 * 127 - 2 * (scale >> 23)).to(tl.int64) << 52
    return squares + group.to(tl.float64) * unscale.to(tl.float64, bitcast=True)


@triton.jit
def largest(magnitudes):
    """The maximum of each group, NaN ignored."""
    return tl.max(tl.where(magnitudes > _INFINITY, 0, magnitudes), axis=1)


@triton.jit
def nonfinite(magnitudes):
    """The number of infinities and NaNs of each group."""
    return tl.sum((magnitudes >= _INFINITY).to(tl.int32), axis=1)


# --- telemetry: columns of onepass/engine/hyper_table.py --------------------------------------


@triton.jit
def add_values(squares, values):
    """Adds the squares of a block of elements to squares, float64 [THREADS]."""
    PER: tl.constexpr = values.shape[0] // THREADS
    groups = tl.reshape(values, (THREADS, PER))
    top = largest(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return add_squares(squares, groups, top)


@triton.jit
def measure(sums, grad, before, after):
    """Adds a block of elements to the telemetry sums of each thread."""
    grads, weights, updates, count = sums
    PER: tl.constexpr = grad.shape[0] // THREADS
    count += nonfinite(tl.reshape(grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (THREADS, PER)))
    return (
        add_values(grads, grad),
        add_values(weights, after),
        add_values(updates, after - before),
        count,
    )


@triton.jit
def no_sums():
    """Telemetry sums of zero: squares of gradients, weights and updates; non-finite gradients."""
    return (
        tl.zeros([THREADS], tl.float64),
        tl.zeros([THREADS], tl.float64),
        tl.zeros([THREADS], tl.float64),
        tl.zeros([THREADS], tl.int32),
    )


@triton.jit
def leave_sums(sums, partials_ptr):
    """Writes the sums of a program to its row of partials, float64 [chunks, 4]."""
    row = partials_ptr + tl.program_id(0).to(tl.int64) * 4
    for i in tl.static_range(3):
        tl.store(row + i, tl.sum(sums[i], axis=0))
    tl.store(row + 3, tl.sum(sums[3], axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["partials_ptr", "chunks_ptr", "spans_ptr", "telemetry_ptr"])
def total_telemetry(partials_ptr, chunks_ptr, spans_ptr, telemetry_ptr):
    """Adds the partial results of one row per program, in the order of the chunks.

    spans_ptr: int64 [rows, 2], the first chunk of each row and the chunk after its last. Chunks of
    other rows may be in between.
    """
    row = tl.program_id(0)
    first = tl.load(spans_ptr + row * 2)
    last = tl.load(spans_ptr + row * 2 + 1)
    columns = tl.arange(0, 4)
    total = tl.zeros([LAST, 4], tl.float64)
    for at in range(first, last, LAST):
        number = at + tl.arange(0, LAST)
        owner = tl.load(chunks_ptr + number * COLUMNS + ROW, mask=number < last, other=-1)
        mine = (owner == row)[:, None] & (columns >= 0)[None, :]
        total += tl.load(partials_ptr + number[:, None] * 4 + columns[None, :], mask=mine, other=0)
    tl.store(telemetry_ptr + row * 4 + columns, tl.sum(total, axis=0))
