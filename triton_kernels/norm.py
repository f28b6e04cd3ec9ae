"""The global norm of the gradients, for clipping. It reads each gradient once.

There are two launches. In the first, programs walk the chunk table of the sweep and write one
partial result each; in the second, one program adds the partial results. The order of additions
depends only on the sizes. The kernels use no atomics and no host synchronization, and they are
compiled once for all lists.

Squares are added as in sums.py, in groups of the elements that a thread reads with one 16-byte
access.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from . import sums as sums_of
from .floats import from_bf16, from_fp16, from_fp32
from .table import COLUMNS, COUNT, ENTRY, INTERPRETED, START

# The largest number of programs of the first launch. Program p takes chunks p, p + PROGRAMS and so
# on, so that all programs have equal shares. Untuned.
PROGRAMS = tl.constexpr(8192)
# Groups that a program loads at once: four accesses per thread on NVIDIA GPUs, two on AMD GPUs.
GROUPS = tl.constexpr(1024)
# Partial results that the program of the second launch loads at once.
LAST = tl.constexpr(1024)
# Eight warps are 256 threads on NVIDIA GPUs and 512 on AMD GPUs. With four warps on gfx942, a
# thread decodes 32 values of a 16-bit gradient at once, and the kernel uses 164 registers with
# Triton 3.8.0 (127 with 3.7.1). With eight warps it uses 79 (74 with 3.7.1).
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False, "sanitize_overflow": False}


@triton.jit
def add_block(sums, ptr, offsets, mask, DECODE: tl.constexpr, FULL: tl.constexpr):
    """Adds a block of [GROUPS, elements of a group] to the sums; one thread holds each group."""
    squares, largest, nonfinite = sums
    values = DECODE(tl.load(ptr + offsets) if FULL else tl.load(ptr + offsets, mask=mask, other=0))
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = sums_of.largest(magnitudes)
    nonfinite += sums_of.nonfinite(magnitudes)
    largest = tl.maximum(largest, top)
    return sums_of.add_squares(squares, values, top), largest, nonfinite


@triton.jit
def add_chunk(sums, address, count, ELEMENT: tl.constexpr, DECODE: tl.constexpr):
    """Adds one chunk: full blocks without a mask if they are aligned, the rest with a mask."""
    GROUP: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    BLOCK: tl.constexpr = GROUPS * GROUP
    ptr = address.to(tl.pointer_type(ELEMENT))
    aligned = tl.multiple_of(ptr, 16)
    whole = tl.where(address % 16 == 0, count // BLOCK * BLOCK, 0)
    offsets = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for first in range(0, whole, BLOCK):
        sums = add_block(sums, aligned, first + offsets, None, DECODE, True)
    for first in range(whole, count, BLOCK):
        sums = add_block(sums, ptr, first + offsets, first + offsets < count, DECODE, False)
    return sums


@triton.jit(do_not_specialize=["num_chunks"])
def partial_norms(chunks_ptr, grads_ptr, formats_ptr, num_chunks, partials_ptr):
    """Writes a column of partials, float64 [3, PROGRAMS], for each program."""
    sums = (
        tl.zeros([GROUPS], tl.float64),
        tl.zeros([GROUPS], tl.int32),
        tl.zeros([GROUPS], tl.int32),
    )
    for number in range(tl.program_id(0), num_chunks, PROGRAMS):
        chunk = chunks_ptr + number * COLUMNS
        count = tl.load(chunk + COUNT).to(tl.int32)
        start = tl.load(chunk + START)
        entry = tl.load(chunk + ENTRY)
        address = tl.load(grads_ptr + entry)
        code = tl.load(formats_ptr + entry)
        if code == 0:
            sums = add_chunk(sums, address + start * 4, count, tl.float32, from_fp32)
        elif code == 1:
            sums = add_chunk(sums, address + start * 2, count, tl.uint16, from_bf16)
        else:
            sums = add_chunk(sums, address + start * 2, count, tl.uint16, from_fp16)
    squares, largest, nonfinite = sums
    column = partials_ptr + tl.program_id(0)
    tl.store(column, tl.sum(squares, axis=0))
    largest = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(column + PROGRAMS, largest.to(tl.float64))
    nonfinite = tl.sum(nonfinite.to(tl.int64), axis=0)
    tl.store(column + 2 * PROGRAMS, nonfinite.to(tl.float64))


@triton.jit(do_not_specialize=["num_partials"])
def total_norm(partials_ptr, num_partials, norm_ptr):
    """Adds the partial results; launched with one program."""
    squares = tl.zeros([LAST], tl.float64)
    largest = tl.zeros([LAST], tl.float64)
    nonfinite = tl.zeros([LAST], tl.float64)
    for first in range(0, num_partials, LAST):
        offsets = first + tl.arange(0, LAST)
        mask = offsets < num_partials
        squares += tl.load(partials_ptr + offsets, mask=mask, other=0)
        largest = tl.maximum(
            largest, tl.load(partials_ptr + PROGRAMS + offsets, mask=mask, other=0)
        )
        nonfinite += tl.load(partials_ptr + 2 * PROGRAMS + offsets, mask=mask, other=0)
    tl.store(norm_ptr, tl.sum(squares, axis=0))
    tl.store(norm_ptr + 1, tl.max(largest, axis=0))
    tl.store(norm_ptr + 2, tl.sum(nonfinite, axis=0))


def launch(chunks: torch.Tensor, grads: torch.Tensor, formats: torch.Tensor) -> torch.Tensor:
    """Launches the norm over all chunks on the current device and stream.

    Args:
        chunks: int64 [chunks, COLUMNS], the chunk table of the sweep.
        grads: int64 [entries], the addresses of the gradients.
        formats: int32 [entries], the numbers of their formats.

    Returns:
        float64 [3]: sum of squares, largest magnitude, count of non-finite elements.
    """
    norm = torch.zeros(3, dtype=torch.float64, device=chunks.device)
    programs = min(len(chunks), PROGRAMS.value)
    if not programs:
        return norm
    partials = torch.empty(3, PROGRAMS.value, dtype=torch.float64, device=chunks.device)
    # The interpreter computes with NumPy, which would warn about infinities.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        partial_norms[(programs,)](chunks, grads, formats, len(chunks), partials, **OPTIONS)
        total_norm[(1,)](partials, programs, norm, **OPTIONS)
    return norm
