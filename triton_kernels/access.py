"""Loads and stores of codes (encoded elements) and of their extra tensor: scales or companions."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import each, pack, unpack
from .packing import UPPER, pair_of
from .table import THREADS


@triton.jit
def load(address, first, lanes, count, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Loads elements first + lanes of a tensor of count elements at an integer address.

    FULL: all of them are inside the tensor, and the address is a multiple of 16.
    """
    ptr = address.to(tl.pointer_type(TYPE))
    if FULL:
        # Triton ignores the alignment hint on the integer and would emit scalar accesses, so the
        # hint is on the pointer.
        return tl.load(tl.multiple_of(ptr, 16) + (first + lanes))
    return tl.load(ptr + (first + lanes), mask=first + lanes < count, other=0)


@triton.jit
def store(address, first, lanes, count, stored, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Stores elements first + lanes; the arguments are those of load."""
    ptr = address.to(tl.pointer_type(TYPE))
    if FULL:
        tl.store(tl.multiple_of(ptr, 16) + (first + lanes), stored)
    else:
        tl.store(ptr + (first + lanes), stored, mask=first + lanes < count)


@triton.jit
def load_codes(address, first, count, TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Loads BLOCK codes. Those of 16 bits are in the upper halves of 32-bit words: from pairs of
    codes, this takes one instruction per code."""
    if TYPE.primitive_bitwidth != 16:
        codes = load(address, first, tl.arange(0, BLOCK), count, TYPE, FULL)
    elif FULL:
        pairs = load(address, first // 2, tl.arange(0, BLOCK // 2), count, tl.uint32, FULL)
        codes = tl.reshape(tl.join(pairs << 16, pairs & UPPER), (BLOCK,))
    else:
        codes = load(address, first, tl.arange(0, BLOCK), count, TYPE, FULL).to(tl.uint32) << 16
    return codes


@triton.jit
def store_codes(
    address, first, count, codes, TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """Stores BLOCK codes; the inverse of load_codes."""
    if TYPE.primitive_bitwidth != 16:
        store(address, first, tl.arange(0, BLOCK), count, codes, TYPE, FULL)
    elif FULL:
        even, odd = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
        pairs = pair_of(even, odd)
        store(address, first // 2, tl.arange(0, BLOCK // 2), count, pairs, tl.uint32, FULL)
    else:
        codes = (codes >> 16).to(TYPE)
        store(address, first, tl.arange(0, BLOCK), count, codes, TYPE, FULL)


@triton.jit
def load_stored(
    at, extra_at, first, count, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """Loads BLOCK elements: (codes, scales or companions). first and count are in elements."""
    ELEMENT: tl.constexpr = FORMAT.element
    PACKED: tl.constexpr = FORMAT.packed
    EXTRA: tl.constexpr = FORMAT.extra
    SIZE: tl.constexpr = FORMAT.block
    limit = (count + (PACKED - 1)) // PACKED
    codes = load_codes(at, first // PACKED, limit, ELEMENT, BLOCK // PACKED, FULL)
    if PACKED == 2:
        codes = unpack(codes.to(tl.uint32))
    extra = codes
    if EXTRA is not None:
        limit = (count + (SIZE - 1)) // SIZE
        WHOLE: tl.constexpr = FULL and SIZE == 1
        extra = load_codes(extra_at, first // SIZE, limit, EXTRA, BLOCK // SIZE, WHOLE)
    return codes, extra


@triton.jit
def store_scales(address, first, count, scales, TYPE: tl.constexpr, SIZE: tl.constexpr):
    """Stores the scales of whole blocks of SIZE elements.

    The stored tensor has one value per thread, so that each thread stores a scale that it holds.
    Triton would move a shorter tensor through shared memory to the first warps.
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
    """Stores BLOCK elements: the codes, and extra, their scales or companions."""
    ELEMENT: tl.constexpr = FORMAT.element
    PACKED: tl.constexpr = FORMAT.packed
    EXTRA: tl.constexpr = FORMAT.extra
    SIZE: tl.constexpr = FORMAT.block
    if PACKED == 2:
        if not FULL:
            # An unused upper half of the last byte is zero.
            codes = tl.where(first + tl.arange(0, BLOCK) < count, codes, 0).to(tl.uint32)
        codes = pack(codes).to(ELEMENT)
    limit = (count + (PACKED - 1)) // PACKED
    store_codes(at, first // PACKED, limit, codes, ELEMENT, BLOCK // PACKED, FULL)
    if SIZE > 1:
        store_scales(extra_at, first // SIZE, count, extra, EXTRA, SIZE)
    elif EXTRA is not None:
        store_codes(extra_at, first, count, extra, EXTRA, BLOCK, FULL)


@triton.jit
def only_elements(values, first, count, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Sets values past the end to zero, so that they do not affect the scale of their block."""
    if not FULL and FORMAT.block > 1:
        values = tl.where(first + tl.arange(0, values.shape[0]) < count, values, 0.0)
    return values


@triton.jit
def record_changes(
    address, first, count, before, after, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Sets the bits of the elements whose codes differ, in the record at an integer address.

    Args:
        address: the word of element 0.
        first: a multiple of 32; the block has elements first to first + BLOCK.
        before, after: the codes of the block, as load_codes returns them.
        TYPE: the type of a stored element.
    """
    WORDS: tl.constexpr = BLOCK // 32
    PER: tl.constexpr = THREADS // WORDS
    different = before.to(tl.uint32, bitcast=True) ^ after.to(tl.uint32, bitcast=True)
    differ = different > 0xFFFF if TYPE.primitive_bitwidth == 16 else different != 0
    lanes = tl.arange(0, BLOCK)
    if not FULL:
        # Past the end, the result of a rule may be nonzero although its inputs are zero.
        differ = differ & (first + lanes < count)
    # The sum of different bits is their union.
    bits = tl.where(differ, 1, 0) << (lanes % 32)
    words = tl.sum(tl.reshape(bits, [WORDS, 32]), axis=1)
    # One value per thread, as in store_scales. A word without a change is not written.
    lanes = tl.arange(0, THREADS)
    words = each(words, PER)
    ptr = address.to(tl.pointer_type(tl.int32)) + (first // 32 + lanes // PER)
    kept = (lanes % PER == 0) & (words != 0)
    old = tl.load(ptr, mask=kept, other=0)
    tl.store(ptr, old | words, mask=kept)
