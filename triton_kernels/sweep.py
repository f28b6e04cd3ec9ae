"""The sweep: one kernel that walks the whole parameter list once, whatever it holds.

A program takes one chunk: a stretch of one parameter, described by a row of the chunk table. It
decodes, applies the rule, encodes. Rule and formats are compile-time functions; every number that
can change from step to step is read from a table in device memory, so that nothing is compiled
again. Lists that mix rules' flags, dtypes or formats are compiled into one kernel with a branch per
variant, taken uniformly by all threads of a program.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from onepass import rules as rule_table

from . import formats
from .blocks import each, pack, unpack
from .variants import Variant as Variant
from .variants import Variants, has_slot, root_slot, state_format, variant_at

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Columns of the chunk table, int64, a row per chunk.
PARAM = tl.constexpr(0)  # address of the chunk's first element
STATES = tl.constexpr(1)  # likewise, of the states in slots 0, 1, 2
SCALES = tl.constexpr(4)  # of their scales
COMPANION = tl.constexpr(7)  # of the weight's companion
ENTRY = tl.constexpr(8)  # row of the gradient table, which holds the addresses of whole gradients
START = tl.constexpr(9)  # position of the chunk in its tensors
COUNT = tl.constexpr(10)  # its elements
ROW = tl.constexpr(11)  # of the hyperparameter and counter tables
PARAM_ID = tl.constexpr(12)  # keys the random bits
INDEX = tl.constexpr(13)  # likewise: of the first element in the whole parameter
VARIANT = tl.constexpr(14)  # position in VARIANTS
COLUMNS = tl.constexpr(15)

HYPER_WIDTH = tl.constexpr(rule_table.HYPER_WIDTH)


@dataclass(frozen=True)
class Tuning:
    """Elements that a program takes at once, warps of a program, elements of a chunk, and the most
    registers of a thread where states have 8 bits or fewer.

    A block is four elements a thread: one 16-byte access for fp32 and 8 bytes for 16-bit formats.
    With more, Triton would lay out fp32 and narrower tensors differently when it writes them, and
    exchange them through shared memory. Variants with 8-bit states that write no fp32 take two
    blocks at once: 8 bytes for the codes.

    Chunks are whole blocks, and a multiple of every format's block, so that no two programs share a
    scale. With 128 registers two programs fit an NVIDIA multiprocessor; ptxas would take more for
    8-bit states. (AMD's compiler has no such option.)
    """

    block: int
    num_warps: int
    chunk: int
    registers: int | None

    def options(self, narrow: bool = False) -> dict[str, Any]:
        """What kernels are compiled with; narrow: for states of 8 bits or fewer."""
        found = {"num_warps": self.num_warps, "enable_fp_fusion": False, "sanitize_overflow": False}
        return {**found, "maxnreg": self.registers} if narrow and self.registers else found


# By warp size: NVIDIA, AMD CDNA. Untuned: no GPU has run these yet.
TUNING = {32: Tuning(1024, 8, 8192, 128), 64: Tuning(1024, 4, 8192, None)}
THREADS = tl.constexpr(256)  # of a program, in each of them


def tuning(device: torch.device) -> Tuning:
    """The row of :data:`TUNING` for a device."""
    if device.type == "cpu":
        return TUNING[32]
    return TUNING[torch.cuda.get_device_properties(device).warp_size]


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


@triton.jit
def unit_root(root):
    return tl.where(root == 0, 1.0, root)


@triton.jit
def store_state(
    at, states, words, root, first, count, maps, V: tl.constexpr, SLOT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Encodes the state of a slot; returns what states after it are measured in."""
    FORMAT: tl.constexpr = state_format(V, SLOT)
    ROOT: tl.constexpr = root_slot(V)
    _, _, _, states_at, scales_at = at
    random = (words[SLOT // 2] >> (SLOT % 2 * 16)) & 0xFFFF
    values = only_elements(states[SLOT], first, count, FORMAT, FULL)
    codes, extra = FORMAT.encode(values, random, root, maps)
    store_stored(states_at[SLOT], scales_at[SLOT], first, count, codes, extra, FORMAT, BLOCK, FULL)
    if SLOT == ROOT:
        root = unit_root(FORMAT.root(codes, extra))
    return root


@triton.jit
def sweep_block(
    at, h, stream, index, first, count, maps, V: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One block: decode, rule, encode. FULL: no mask, and every address a multiple of 16."""
    param_at, companion_at, grad_at, states_at, scales_at = at
    SLOTS: tl.constexpr = V.slots
    PARAM: tl.constexpr = V.param_format
    GRAD: tl.constexpr = V.grad_format
    ROOT: tl.constexpr = root_slot(V)
    codes, extra = load_stored(param_at, companion_at, first, count, PARAM, BLOCK, FULL)
    param = PARAM.decode(codes, extra, 0, maps)
    codes, extra = load_stored(grad_at, grad_at, first, count, GRAD, BLOCK, FULL)
    grad = h[0] * GRAD.decode(codes, extra, 0, maps)
    # Second moments rest first: what others are measured in.
    root = param
    if ROOT is not None:
        S: tl.constexpr = state_format(V, ROOT)
        codes, extra = load_stored(states_at[ROOT], scales_at[ROOT], first, count, S, BLOCK, FULL)
        root = unit_root(S.root(codes, extra))
        second = S.decode(codes, extra, root, maps)
    states = ()
    for slot in tl.static_range(SLOTS):
        if not has_slot(V, slot):
            # A stand-in that no rule reads: Triton's tuples cannot hold None.
            states = states + (param,)
        elif slot == ROOT:
            states = states + (second,)
        else:
            codes, extra = load_stored(
                states_at[slot], scales_at[slot], first, count, state_format(V, slot), BLOCK, FULL
            )
            states = states + (state_format(V, slot).decode(codes, extra, root, maps),)
    param, states = V.update(param, grad, states, h[1:], V.flags)
    words = (0, 0)
    if V.stochastic:
        # What nothing draws from is never computed: the compiler drops it.
        offsets = first + tl.arange(0, BLOCK)
        words = (
            formats.random_bits(stream, index, offsets, 0),
            formats.random_bits(stream, index, offsets, 1),
        )
    codes, extra = PARAM.encode(param, words[1] >> 16, 0, maps)
    store_stored(param_at, companion_at, first, count, codes, extra, PARAM, BLOCK, FULL)
    if ROOT is not None:
        root = store_state(at, states, words, root, first, count, maps, V, ROOT, BLOCK, FULL)
    for slot in tl.static_range(SLOTS):
        if has_slot(V, slot) and slot != ROOT:
            store_state(at, states, words, root, first, count, maps, V, slot, BLOCK, FULL)


@triton.jit
def sweep_chunk(
    chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """One chunk: whole blocks without a mask if everything is aligned, the rest with one."""
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
    # An address that the variant has not is 0.
    misaligned = param_at | grad_at | companion_at
    states_at, scales_at = (), ()
    for slot in tl.static_range(SLOTS):
        state_at = tl.load(chunk + STATES + slot)
        misaligned |= state_at
        states_at = states_at + (state_at,)
        scales_at = scales_at + (tl.load(chunk + SCALES + slot),)
    at = (param_at, companion_at, grad_at, states_at, scales_at)
    h = ()
    for i in tl.static_range(SCALARS + 1):
        h = h + (tl.load(hyper_ptr + row * HYPER_WIDTH + i),)
    stream = index
    if V.stochastic:
        stream = formats.random_stream(
            tl.load(counters_ptr + row * 2),
            tl.load(counters_ptr + row * 2 + 1),
            tl.load(chunk + PARAM_ID),
        )
    whole = tl.where(misaligned % 16 == 0, count // SIZE * SIZE, 0)
    for first in range(0, whole, SIZE):
        sweep_block(at, h, stream, index, first, count, maps_ptr, V, SIZE, True)
    for first in range(whole, count, BLOCK):
        sweep_block(at, h, stream, index, first, count, maps_ptr, V, BLOCK, False)


@triton.jit
def sweep(
    chunks_ptr, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, VARIANTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step over the chunk table; the grid has one program per chunk.

    Parameters and states are updated in place; gradients are only read.
    """
    NUM_VARIANTS: tl.constexpr = VARIANTS.count
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    if NUM_VARIANTS == 1:
        sweep_chunk(
            chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, variant_at(VARIANTS, 0), BLOCK
        )
    else:
        variant = tl.load(chunk + VARIANT)
        for v in tl.static_range(NUM_VARIANTS):
            if variant == v:
                sweep_chunk(
                    chunk, grads_ptr, hyper_ptr, counters_ptr, maps_ptr, variant_at(VARIANTS, v),
                    BLOCK,
                )  # fmt: skip


def launch(
    chunks: torch.Tensor,
    grads: torch.Tensor,
    hyper: torch.Tensor,
    counters: torch.Tensor,
    maps: torch.Tensor,
    variants: Variants,
    tuned: Tuning,
) -> None:
    """Launches the sweep over all chunks on the current device and stream.

    Args:
        chunks: int64 [chunks, COLUMNS]; it holds addresses, which must be valid on the device.
        grads: int64 [entries], the addresses of the gradients.
        hyper: fp32 [rows, HYPER_WIDTH].
        counters: int64 [rows, 2], seed and step.
        maps: fp32 [4, 256], the tables of :data:`onepass.triton_kernels.blocks.DYNAMIC_TABLES`.
    """
    # NumPy, which the interpreter computes with, would warn of every overflow.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        sweep[(len(chunks),)](
            chunks,
            grads,
            hyper,
            counters,
            maps,
            VARIANTS=variants,
            BLOCK=tuned.block,
            **tuned.options(variants.narrow),
        )
