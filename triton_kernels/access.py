"""Reading and writing stored elements: tensors, codes of 4 and 8 bits, and what is beside them."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import each, pack, unpack
from .table import THREADS


@triton.jit
def load(address, first, lanes, count, TYPE: tl.constexpr, FULL: tl.constexpr):
    ptr = address.to(tl.pointer_type(TYPE))
    if FULL:
        # The hint must be on the pointer: on the integer it is lost, and accesses are scalar.
        return tl.load(tl.multiple_of(ptr, 16) + (first + lanes))
    return tl.load(ptr + (first + lanes), mask=first + lanes < count, other=0)


@triton.jit
def store(address, first, lanes, count, stored, TYPE: tl.constexpr, FULL: tl.constexpr):
    ptr = address.to(tl.pointer_type(TYPE))
    if FULL:
        tl.store(tl.multiple_of(ptr, 16) + (first + lanes), stored)
    else:
        tl.store(ptr + (first + lanes), stored, mask=first + lanes < count)


@triton.jit
def load_stored(
    at, extra_at, first, count, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """(codes, what is beside them) of one block of elements."""
    ELEMENT: tl.constexpr = FORMAT.element
    PACKED: tl.constexpr = FORMAT.packed
    EXTRA: tl.constexpr = FORMAT.extra
    SIZE: tl.constexpr = FORMAT.block
    lanes = tl.arange(0, BLOCK // PACKED)
    limit = (count + (PACKED - 1)) // PACKED
    codes = load(at, first // PACKED, lanes, limit, ELEMENT, FULL)
    if PACKED == 2:
        codes = unpack(codes)
    extra = codes
    if EXTRA is not None:
        lanes = tl.arange(0, BLOCK // SIZE)
        limit = (count + (SIZE - 1)) // SIZE
        extra = load(extra_at, first // SIZE, lanes, limit, EXTRA, FULL and SIZE == 1)
    return codes, extra


@triton.jit
def store_scales(address, first, count, scales, TYPE: tl.constexpr, SIZE: tl.constexpr):
    """The scales of whole blocks of elements.

    As many values as threads, so that Triton stores each from the thread that has it: a shorter
    tensor would go through shared memory to the first warps.
    """
    PER: tl.constexpr = THREADS // scales.shape[0]
    lanes = tl.arange(0, THREADS)
    ptr = address.to(tl.pointer_type(TYPE)) + (first + lanes // PER)
    kept = (lanes % PER == 0) & ((first + lanes // PER) * SIZE < count)
    tl.store(ptr, each(scales, PER), mask=kept)


@triton.jit
def store_stored(
    at, extra_at, first, count, codes, extra, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    ELEMENT: tl.constexpr = FORMAT.element
    PACKED: tl.constexpr = FORMAT.packed
    EXTRA: tl.constexpr = FORMAT.extra
    SIZE: tl.constexpr = FORMAT.block
    if PACKED == 2:
        if not FULL:
            # The unused half of a last byte is zero.
            codes = tl.where(first + tl.arange(0, BLOCK) < count, codes, 0).to(ELEMENT)
        codes = pack(codes)
    lanes = tl.arange(0, BLOCK // PACKED)
    limit = (count + (PACKED - 1)) // PACKED
    store(at, first // PACKED, lanes, limit, codes, ELEMENT, FULL)
    if SIZE > 1:
        store_scales(extra_at, first // SIZE, count, extra, EXTRA, SIZE)
    elif EXTRA is not None:
        store(extra_at, first, lanes, count, extra, EXTRA, FULL)


@triton.jit
def only_elements(values, first, count, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Zeros where there is no element, so that they have no part in the scale of a block."""
    if not FULL and FORMAT.block > 1:
        values = tl.where(first + tl.arange(0, values.shape[0]) < count, values, 0.0)
    return values
