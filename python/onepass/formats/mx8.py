"""mx8: 8-bit codes in blocks of 32 with a power-of-two scale, rounded stochastically.

A first moment is encoded as a sign and E4M3, a second moment as E5M3 (EeMm: e exponent bits, m
mantissa bits). A second moment above zero is never rounded to zero.
"""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U32
from .base import Moment, StateFormat, Stored
from .block_scales import (
    MX_BLOCK,
    NOT_FINITE,
    Minifloat,
    decode_signed,
    each,
    encode_signed,
    largest_of,
    lowest_binade,
    spread,
)
from .fp32 import FORMAT as FP32

E4M3 = Minifloat(4, 3)  # signed; see encode_signed
E5M3 = Minifloat(5, 3)  # code 0 is the value 0


def encode_unsigned(values: F32, random: U32) -> tuple[U8, U8]:
    """Encode nonnegative values in E5M3 as (codes, scales).

    Zero has code 0; any other value has a code of at least 1. A block decodes to NaN if it contains
    a NaN, an infinity or a negative value, including -0.
    """
    m, dropped = np.uint32(E5M3.mantissa), np.uint32(E5M3.dropped)
    scale = lowest_binade(largest_of(values, signed=False), E5M3, 0)
    e = each(scale, len(values))
    bits = values.view(np.uint32)
    rounded = ((bits + spread(random, E5M3)) >> dropped).astype(np.int64)
    code = np.minimum(np.maximum(rounded - (e << m), 1), bits)
    code = np.where(e == NOT_FINITE, 1 << (E5M3.mantissa - 1), code)
    return code.astype(np.uint8), scale


def decode_unsigned(codes: U8, scale: U8) -> F32:
    """Decode the codes of :func:`encode_unsigned`; exact."""
    m, dropped = np.uint32(E5M3.mantissa), np.uint32(E5M3.dropped)
    code = codes.astype(np.uint32)
    bits = (code + (each(scale, len(codes)) << m)) << dropped
    return np.where(code == 0, np.uint32(0), bits).view(np.float32)


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """Encode a state as (codes, scales); the kind of the moment selects the code."""
    if moment.kind == "second":
        return encode_unsigned(values, random)
    return encode_signed(values, random, E4M3)


def decode(codes: U8, scale: U8, count: int, moment: Moment) -> F32:
    """Decode the codes of :func:`encode`; exact."""
    if moment.kind == "second":
        return decode_unsigned(codes, scale)
    return decode_signed(codes, scale, E4M3)


FORMAT = StateFormat(
    "mx8",
    code=5,
    dtype=torch.uint8,
    encode=encode,
    decode=decode,
    stochastic=True,
    block=MX_BLOCK,
    scale=torch.uint8,
    for_weights=FP32,
)
