# mypy: ignore-errors
"""The kernels of the GPU ladder: AdamW in fp32, with the rule of onepass."""

from __future__ import annotations

import triton
import triton.language as tl

from onepass.triton_kernels.rules import adam

DECOUPLED = tl.constexpr(1)


@triton.jit
def update(
    param, grad, exp_avg, exp_avg_sq, offsets, mask, h, MASKED: tl.constexpr, EVICT: tl.constexpr
):
    """Updates the elements at the given offsets of the four tensors."""
    if MASKED:
        w = tl.load(param + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
        g = tl.load(grad + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
        m = tl.load(exp_avg + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
        v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
    else:
        w = tl.load(param + offsets, eviction_policy=EVICT)
        g = tl.load(grad + offsets, eviction_policy=EVICT)
        m = tl.load(exp_avg + offsets, eviction_policy=EVICT)
        v = tl.load(exp_avg_sq + offsets, eviction_policy=EVICT)
    w, states = adam(w, g, (m, v, v), h, DECOUPLED)
    if MASKED:
        tl.store(param + offsets, w, mask=mask, eviction_policy=EVICT)
        tl.store(exp_avg + offsets, states[0], mask=mask, eviction_policy=EVICT)
        tl.store(exp_avg_sq + offsets, states[1], mask=mask, eviction_policy=EVICT)
    else:
        tl.store(param + offsets, w, eviction_policy=EVICT)
        tl.store(exp_avg + offsets, states[0], eviction_policy=EVICT)
        tl.store(exp_avg_sq + offsets, states[1], eviction_policy=EVICT)


@triton.jit
def numbers(row):
    """Reads the row of hyperparameters, in the order of Hyper in csrc/rules/adam.h."""
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
    )


# Not specialised on alignment: otherwise the compiler would use vector loads in this rung already.
@triton.jit(do_not_specialize=["param", "grad", "exp_avg", "exp_avg_sq", "numel"])
def one_tensor(param, grad, exp_avg, exp_avg_sq, row, numel, BLOCK: tl.constexpr):
    """Updates one tensor; each program takes BLOCK elements."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    update(
        param, grad, exp_avg, exp_avg_sq, offsets, offsets < numel, numbers(row), True, ""
    )  # fmt: skip


@triton.jit
def chunk(
    table, index, h, BLOCK: tl.constexpr, VECTORS: tl.constexpr, EVICT: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Updates one chunk: row ``index`` of the chunk table."""
    at = table + index * COLUMNS
    param = tl.load(at).to(tl.pointer_type(tl.float32))
    grad = tl.load(at + 1).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(at + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(at + 3).to(tl.pointer_type(tl.float32))
    count = tl.load(at + 4).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    if VECTORS:
        if count == WHOLE:
            # The hint is given for the pointer: given for the integer address, it is lost.
            param = tl.multiple_of(param, 16)
            grad = tl.multiple_of(grad, 16)
            exp_avg = tl.multiple_of(exp_avg, 16)
            exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
            for first in range(0, WHOLE, BLOCK):
                update(
                    param, grad, exp_avg, exp_avg_sq, first + lanes, lanes < BLOCK, h, False, EVICT
                )  # fmt: skip
        else:
            for first in range(0, count, BLOCK):
                offsets = first + lanes
                update(param, grad, exp_avg, exp_avg_sq, offsets, offsets < count, h, True, EVICT)
    else:
        for first in range(0, count, BLOCK):
            offsets = first + lanes
            update(param, grad, exp_avg, exp_avg_sq, offsets, offsets < count, h, True, EVICT)


@triton.jit
def whole_list(
    table, row, chunks, BLOCK: tl.constexpr, VECTORS: tl.constexpr, EVICT: tl.constexpr,
    PERSISTENT: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Updates the whole list: one chunk per program, or several if PERSISTENT."""
    h = numbers(row)
    if PERSISTENT:
        for index in range(tl.program_id(0), chunks, tl.num_programs(0)):
            chunk(table, index, h, BLOCK, VECTORS, EVICT, WHOLE, COLUMNS)
    else:
        chunk(table, tl.program_id(0), h, BLOCK, VECTORS, EVICT, WHOLE, COLUMNS)
