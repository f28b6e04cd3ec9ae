"""dynamic8: the 8-bit dynamic map of bitsandbytes, blocks of 256 with an fp32 scale.

Values are rounded to nearest.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U32
from .base import Moment, StateFormat, Stored
from .block_scales import blocks_of
from .fp32 import FORMAT as FP32

DYNAMIC_BLOCK = 256
DYNAMIC_CELLS = 3072


@cache
def dynamic_map(signed: bool) -> F32:
    """The 256 values of the dynamic map of bitsandbytes, in ascending order.

    The map contains 0, 1 and the centres of 2^d equal parts (unsigned: 2^(d+1)) of decade d, for
    seven decades, d = 0 to 6, from 1e-7 to 1. The signed map contains both signs of these centres.
    The values are computed in float64 and rounded once. bitsandbytes computes them with
    torch.linspace in fp32, whose last bit depends on the processor.
    """
    positive = []
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        for j in range(parts):
            positive.append((0.1 + 0.9 * ((j + 0.5) / parts)) * 10.0 ** (decade - 6))
    negative = [-value for value in reversed(positive)] if signed else []
    return np.array([*negative, 0.0, *positive, 1.0], np.float32)


@cache
def dynamic_edges(signed: bool) -> F32:
    """The 255 midpoints of the map; a value above midpoint k has a code above k."""
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) * np.float32(0.5)


@cache
def dynamic_cells(signed: bool) -> U32:
    """The table with which kernels encode; csrc/formats/dynamic8.h describes it."""
    shift = np.uint32(17 if signed else 16)
    cell = np.arange(DYNAMIC_CELLS, dtype=np.uint32) + (np.uint32(0x34000000) >> shift)
    lowest = cell << shift
    # The value that has these bits, or whose magnitude has their complement.
    negative = lowest > 0x3FFFFFFF
    value = np.where(negative, ~lowest, lowest).view(np.float32)
    edges = np.append(dynamic_edges(signed), np.float32(np.inf))
    code = np.searchsorted(edges, value, side="left")
    edge = edges.view(np.uint32)[code]
    behind = np.where(negative, ~edge, edge).astype(np.int64) + 1 - lowest
    left = 24 - int(shift)
    carry = np.where(behind < 1 << int(shift), (1 << 24) - (behind << left), 0)
    return ((code.astype(np.int64) - cell << 24) + carry).astype(np.uint32)


def has_signed_map(moment: Moment) -> bool:
    """Whether a state is encoded with the signed map.

    As in bitsandbytes, second moments in slot 0 (Adagrad and RMSprop) also use the signed map.
    """
    return moment.kind != "second" or moment.slot == 0


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """Encode values as (codes of the nearest map values, largest magnitude of each block)."""
    signed = has_signed_map(moment)
    largest = np.abs(blocks_of(values, DYNAMIC_BLOCK)).max(axis=1, initial=0)
    largest = np.where(np.isfinite(largest), largest, np.float32("nan")).astype(np.float32)
    each = np.repeat(largest, DYNAMIC_BLOCK)[: len(values)]
    unit = values / np.where(each == 0, np.float32(1), each)
    codes = np.searchsorted(dynamic_edges(signed), unit, side="left")
    return np.where(np.isnan(each), 0, codes).astype(np.uint8), largest


def decode(codes: U8, largest: F32, count: int, moment: Moment) -> F32:
    """Decode the codes of :func:`encode`: map value times the largest magnitude of the block."""
    values = dynamic_map(has_signed_map(moment))[codes]
    return values * np.repeat(largest, DYNAMIC_BLOCK)[: len(codes)]


FORMAT = StateFormat(
    "dynamic8",
    code=7,
    dtype=torch.uint8,
    encode=encode,
    decode=decode,
    block=DYNAMIC_BLOCK,
    scale=torch.float32,
    for_weights=FP32,
)
