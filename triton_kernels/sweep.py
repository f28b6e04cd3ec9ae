"""The sweep: one kernel that walks the whole parameter list once, whatever it holds.

A program takes one chunk: a stretch of one parameter, described by a row of the chunk table. It
decodes, applies the rule, encodes. Rule and formats are compile-time functions; every number that
can change from step to step is read from a table in device memory, so that nothing is compiled
again. Lists that mix rules' flags, dtypes or formats are compiled into one kernel with a branch per
variant, taken uniformly by all threads of a program.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from onepass import rules as rule_table
from onepass.formats import ABSENT

from . import formats, rules
from .formats import FORMATS

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Columns of the chunk table, int64, a row per chunk.
PARAM = tl.constexpr(0)  # address of the chunk's first element
STATES = tl.constexpr(1)  # likewise, of the states in slots 0, 1, 2
ENTRY = tl.constexpr(4)  # row of the gradient table, which holds the addresses of whole gradients
START = tl.constexpr(5)  # position of the chunk in its tensors
COUNT = tl.constexpr(6)  # its elements
ROW = tl.constexpr(7)  # of the hyperparameter and counter tables
PARAM_ID = tl.constexpr(8)  # keys the random bits
INDEX = tl.constexpr(9)  # likewise: of the first element in the whole parameter
VARIANT = tl.constexpr(10)  # position in VARIANTS
COLUMNS = tl.constexpr(11)

HYPER_WIDTH = tl.constexpr(rule_table.HYPER_WIDTH)


@dataclass(frozen=True)
class Tuning:
    """Elements that a program takes at once, warps of a program, elements of a chunk.

    BLOCK is four elements a thread: one 16-byte access for fp32 and 8 bytes for 16-bit formats.
    With more, Triton would lay out fp32 and 16-bit tensors differently and exchange them through
    shared memory.
    """

    block: int
    num_warps: int
    chunk: int


# By warp size: NVIDIA, AMD CDNA. Untuned: no GPU has run these yet.
TUNING = {32: Tuning(1024, 8, 8192), 64: Tuning(1024, 4, 8192)}


def tuning(device: torch.device) -> Tuning:
    """The row of :data:`TUNING` for a device."""
    if device.type == "cpu":
        return TUNING[32]
    return TUNING[torch.cuda.get_device_properties(device).warp_size]


@dataclass(frozen=True, order=True)
class Variant:
    """What the code for a chunk is compiled from: a rule with its flags, and the formats.

    Attributes:
        rule: name in :data:`onepass.rules.RULES`.
        flags: the rule's, as :meth:`onepass.rules.Rule.flag_bits` gives them.
        param, grad: codes of their formats.
        states: codes of the states' formats, ABSENT for a slot that is not there.
    """

    rule: str
    flags: int
    param: int
    grad: int
    states: tuple[int, ...]

    @cached_property
    def update(self) -> Any:
        return rules.RULES[self.rule]

    @cached_property
    def scalars(self) -> int:
        return rule_table.RULES[self.rule].scalars

    @cached_property
    def slots(self) -> int:
        return len(rule_table.RULES[self.rule].slots)

    @cached_property
    def param_format(self) -> formats.Format:
        return FORMATS[self.param]

    @cached_property
    def grad_format(self) -> formats.Format:
        return FORMATS[self.grad]

    @cached_property
    def state_formats(self) -> tuple[formats.Format | None, ...]:
        return tuple(None if c == ABSENT else FORMATS[c] for c in self.states[: self.slots])

    @cached_property
    def stochastic(self) -> bool:
        return any(f is not None and f.stochastic for f in self.state_formats)

    @cached_property
    def functions(self) -> list[Any]:
        """The functions that it brings into the kernel."""
        used = [self.param_format, self.grad_format, *filter(None, self.state_formats)]
        return [self.update, *(f for u in used for f in (u.decode, u.encode))]


class Variants:
    """The variants of a launch, as one constexpr: Triton cannot nest functions in its own tuples.

    Two with the same variants in the same order are equal.
    """

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        self.variants = variants
        self.count = len(variants)
        self._hash = hash(variants)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variants) and self.variants == other.variants

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def cache_key(self) -> str:
        """Key of Triton's cache on disk, which cannot see the sources behind a constexpr."""
        sources = [getattr(f, "cache_key", "") for v in self.variants for f in v.functions]
        return hashlib.sha256(repr((self.variants, sources)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Variants_{self.cache_key}"


@triton.constexpr_function
def variant_at(variants, position):
    return variants.variants[position]


@triton.constexpr_function
def state_format(variant, slot):
    return variant.state_formats[slot]


@triton.jit
def load_block(address, offsets, mask, FORMAT: tl.constexpr, FULL: tl.constexpr):
    ptr = address.to(tl.pointer_type(FORMAT.element))
    if FULL:
        # The hint must be on the pointer: on the integer it is lost, and accesses are scalar.
        stored = tl.load(tl.multiple_of(ptr, 16) + offsets)
    else:
        stored = tl.load(ptr + offsets, mask=mask)
    return FORMAT.decode(stored)


@triton.jit
def store_block(address, offsets, mask, values, random, FORMAT: tl.constexpr, FULL: tl.constexpr):
    ptr = address.to(tl.pointer_type(FORMAT.element))
    stored = FORMAT.encode(values, random)
    if FULL:
        tl.store(tl.multiple_of(ptr, 16) + offsets, stored)
    else:
        tl.store(ptr + offsets, stored, mask=mask)


@triton.jit
def sweep_block(
    param_at, grad_at, states_at, h, stream, index, offsets, mask, V: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One block: decode, rule, encode. FULL: no mask, and every address a multiple of 16."""
    SLOTS: tl.constexpr = V.slots
    PARAM_FORMAT: tl.constexpr = V.param_format
    GRAD_FORMAT: tl.constexpr = V.grad_format
    param = load_block(param_at, offsets, mask, PARAM_FORMAT, FULL)
    grad = h[0] * load_block(grad_at, offsets, mask, GRAD_FORMAT, FULL)
    states = ()
    for slot in tl.static_range(SLOTS):
        if state_format(V, slot) is None:
            # A stand-in that no rule reads: Triton's tuples cannot hold None.
            states = states + (param,)
        else:
            state = load_block(states_at[slot], offsets, mask, state_format(V, slot), FULL)
            states = states + (state,)
    param, states = V.update(param, grad, states, h[1:], V.flags)
    store_block(param_at, offsets, mask, param, 0, PARAM_FORMAT, FULL)
    words = (0, 0)
    if V.stochastic:
        # What no slot draws from is never computed: the compiler drops it.
        words = (
            formats.random_bits(stream, index, offsets, 0),
            formats.random_bits(stream, index, offsets, 1) if SLOTS > 2 else 0,
        )
    for slot in tl.static_range(SLOTS):
        if state_format(V, slot) is not None:
            random = (words[slot // 2] >> (slot % 2 * 16)) & 0xFFFF
            store_block(
                states_at[slot], offsets, mask, states[slot], random, state_format(V, slot), FULL
            )


@triton.jit
def sweep_chunk(chunk, grads_ptr, hyper_ptr, counters_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk: whole blocks without a mask if everything is aligned, the rest with one."""
    SLOTS: tl.constexpr = V.slots
    SCALARS: tl.constexpr = V.scalars
    start = tl.load(chunk + START)
    count = tl.load(chunk + COUNT).to(tl.int32)
    row = tl.load(chunk + ROW)
    index = tl.load(chunk + INDEX)
    param_at = tl.load(chunk + PARAM)
    grad_at = tl.load(grads_ptr + tl.load(chunk + ENTRY))
    grad_at += start * (V.grad_format.element.primitive_bitwidth // 8)
    misaligned = param_at | grad_at
    states_at = ()
    for slot in tl.static_range(SLOTS):
        state_at = tl.load(chunk + STATES + slot)
        misaligned |= state_at
        states_at = states_at + (state_at,)
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
    whole = count // BLOCK * BLOCK
    whole = tl.where(misaligned % 16 == 0, whole, 0)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, whole, BLOCK):
        sweep_block(param_at, grad_at, states_at, h, stream, index, first + lanes, None, V, True)
    for first in range(whole, count, BLOCK):
        offsets = first + lanes
        sweep_block(
            param_at, grad_at, states_at, h, stream, index, offsets, offsets < count, V, False
        )


@triton.jit
def sweep(
    chunks_ptr, grads_ptr, hyper_ptr, counters_ptr, VARIANTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One step over the chunk table; the grid has one program per chunk.

    Parameters and states are updated in place; gradients are only read.
    """
    NUM_VARIANTS: tl.constexpr = VARIANTS.count
    chunk = chunks_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    if NUM_VARIANTS == 1:
        sweep_chunk(chunk, grads_ptr, hyper_ptr, counters_ptr, variant_at(VARIANTS, 0), BLOCK)
    else:
        variant = tl.load(chunk + VARIANT)
        for v in tl.static_range(NUM_VARIANTS):
            if variant == v:
                sweep_chunk(
                    chunk, grads_ptr, hyper_ptr, counters_ptr, variant_at(VARIANTS, v), BLOCK
                )


def launch(
    chunks: torch.Tensor,
    grads: torch.Tensor,
    hyper: torch.Tensor,
    counters: torch.Tensor,
    variants: Variants,
    tuned: Tuning,
) -> None:
    """Launches the sweep over all chunks on the current device and stream.

    Args:
        chunks: int64 [chunks, COLUMNS]; it holds addresses, which must be valid on the device.
        grads: int64 [entries], the addresses of the gradients.
        hyper: fp32 [rows, HYPER_WIDTH].
        counters: int64 [rows, 2], seed and step.
    """
    # NumPy, which the interpreter computes with, would warn of every overflow.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        sweep[(len(chunks),)](
            chunks,
            grads,
            hyper,
            counters,
            VARIANTS=variants,
            BLOCK=tuned.block,
            num_warps=tuned.num_warps,
            enable_fp_fusion=False,
            sanitize_overflow=False,
        )
