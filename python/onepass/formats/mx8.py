"""mx8: blocks of 32 with a power of two as scale; a first moment in sign + E4M3, a second in E5M3.

EeMm: e bits of exponent, m of mantissa. Rounded stochastically; a second moment above zero never
becomes zero.
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

E4M3 = Minifloat(4, 3)  # with a sign, lifted
E5M3 = Minifloat(5, 3)  # the code 0 is zero


def encode_unsigned(values: F32, random: U32) -> tuple[U8, U8]:
    """Encode values of at least +0 in E5M3, as (codes, scales): 0 as 0, any other as at least 1.

    A negative value, -0 included, makes its block NaN, as a NaN or infinity does.
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
    """Decode the codes of :func:`encode_unsigned`: exact."""
    m, dropped = np.uint32(E5M3.mantissa), np.uint32(E5M3.dropped)
    code = codes.astype(np.uint32)
    bits = (code + (each(scale, len(codes)) << m)) << dropped
    return np.where(code == 0, np.uint32(0), bits).view(np.float32)


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    if moment.kind == "second":
        return encode_unsigned(values, random)
    return encode_signed(values, random, E4M3)


def decode(codes: U8, scale: U8, count: int, moment: Moment) -> F32:
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
)
