"""dynamic8: bitsandbytes' dynamic map over blocks of 256 with an fp32 scale, rounded to nearest.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U32
from .base import Moment, StateFormat, Stored
from .block_scales import blocks_of

DYNAMIC_BLOCK = 256


@cache
def dynamic_map(signed: bool) -> F32:
    """The 256 values of bitsandbytes' dynamic map, ascending.

    They are 0, 1, and in each of seven decades d, the highest up to 1, the centres of 2^d equal
    parts of the decade (unsigned: 2^(d+1)), signed with both signs; in float64, rounded once.
    bitsandbytes has them from torch.linspace in fp32, whose last bit depends on the processor.
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
    """The 255 midpoints between the map's values: what is above the k-th has a code above k."""
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) * np.float32(0.5)


def has_signed_map(moment: Moment) -> bool:
    """Whether a state is coded with the signed map. As in bitsandbytes, second moments in slot 0,
    those of Adagrad and RMSprop, have it too."""
    return moment.kind != "second" or moment.slot == 0


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """(codes, largest magnitude of each block): the nearest value of the map."""
    signed = has_signed_map(moment)
    largest = np.abs(blocks_of(values, DYNAMIC_BLOCK)).max(axis=1, initial=0)
    largest = np.where(np.isfinite(largest), largest, np.float32("nan")).astype(np.float32)
    each = np.repeat(largest, DYNAMIC_BLOCK)[: len(values)]
    unit = values / np.where(each == 0, np.float32(1), each)
    codes = np.searchsorted(dynamic_edges(signed), unit, side="left")
    return np.where(np.isnan(each), 0, codes).astype(np.uint8), largest


def decode(codes: U8, largest: F32, count: int, moment: Moment) -> F32:
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
)
