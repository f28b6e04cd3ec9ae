"""mx4: two 4-bit codes per byte, blocks of 32 with a one-byte scale, rounded stochastically.

A second moment is encoded as its square root, in E2M2 or E3M1 (EeMm: e exponent bits, m mantissa
bits). A relative first moment is encoded as its ratio to that root, with 15 evenly spaced values.
Any other first moment is encoded as a sign and E2M1.
"""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U8, U32
from .base import Moment, StateFormat, Stored
from .block_scales import (
    INFINITY,
    MAGNITUDE,
    MX_BLOCK,
    NOT_FINITE,
    Minifloat,
    blocks_of,
    decode_signed,
    each,
    encode_signed,
    largest_of,
    lowest_binade,
    spread,
)
from .fp32 import FORMAT as FP32

E2M1 = Minifloat(2, 1)  # signed; see encode_signed
E3M1 = Minifloat(3, 1)  # without a code for zero
E2M2 = Minifloat(2, 2)  # without a code for zero

# The lowest biased exponent of a root: roots of 2^-73 and above have exact, nonzero squares.
LOWEST_ROOT = 54

# The scale of a block of roots is 0 for zeros, at least 1 for codes in E3M1, and at least FINE for
# codes in E2M2. E2M2 encodes roots of 2^-61 and above; no scales are left for smaller roots.
FINE = 132
_COARSE_BIAS = np.uint32(LOWEST_ROOT - 1)  # lowest exponent of the E3M1 codes minus the scale
_FINE_BIAS = np.uint32(66)  # the scale minus the lowest exponent of the E2M2 codes

# Limit of |m| / sqrt(v). A step of Adam is then at most
#     sqrt((limit beta1)^2 / beta2 + (1 - beta1)^2 / (1 - beta2)) lr
# by the Cauchy-Schwarz inequality. This is 7.1 lr for betas of 0.9 and 0.999; exact averages allow
# 7.3 lr. Without the limit, the rounding noise of the ratio and of the root allows steps of twice
# that size while gradients grow.
RATIO_LIMIT = np.float32(7)
# The upper 12 bits of the smallest step between ratios, 1.25 * 2^-32. The largest step, 1, has the
# scale 254; seven such steps are RATIO_LIMIT.
_LEAST_STEP = np.uint32(762)


def per_element(of_blocks: F32, count: int) -> F32:
    """The value of its block for each element."""
    return np.repeat(of_blocks, MX_BLOCK)[:count]


def encode_positive(values: F32, random: U32, small: Minifloat = E3M1) -> tuple[U8, U8]:
    """Encode nonnegative values as (codes, scales), without a code for zero.

    Values below the lowest code take the lowest code. A block of zeros has scale 0 and codes of 0;
    any other block has a scale of at least LOWEST_ROOT. A block decodes to NaN if it contains a
    NaN, an infinity or a negative value, including -0.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    largest = largest_of(values, signed=False)
    scale = lowest_binade(largest, small, LOWEST_ROOT)
    scale[largest == 0] = 0
    e = each(scale, len(values))
    bits = np.maximum(values.view(np.uint32), e << np.uint32(23))
    code = ((bits + spread(random, small)) >> dropped) - (e << m)
    code = np.where(e == NOT_FINITE, np.uint32(1 << (small.mantissa - 1)), code)
    return code.astype(np.uint8), scale


def decode_positive(codes: U8, scale: U8, small: Minifloat = E3M1) -> F32:
    """Decode the codes of :func:`encode_positive`; exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    e = each(scale, len(codes))
    return ((codes.astype(np.uint32) + (e << m)) << dropped).view(np.float32)


def encode_root(values: F32, random: U32) -> tuple[U8, U8]:
    """Encode square roots of second moments as (codes, scales), by :func:`encode_positive`.

    A block is encoded in E2M2 if all 32 roots are in the range of the E2M2 codes, a factor of 8 to
    14, and the lowest power of two is at least 2^-61. Any other block is encoded in E3M1. The scale
    identifies the code.
    """
    coarse, scale = encode_positive(values, random, E3M1)
    fine, exponent = encode_positive(values, random, E2M2)
    least = blocks_of(values, MX_BLOCK).view(np.uint32).min(axis=1, initial=MAGNITUDE)
    wide = exponent.astype(np.uint32)
    fits = (least >= wide << np.uint32(23)) & (wide >= FINE - _FINE_BIAS) & (wide != NOT_FINITE)
    code = np.where(each(fits.astype(np.uint8), len(values)) != 0, fine, coarse)
    kept = (scale == 0) | (scale == NOT_FINITE)
    coarse_scale = np.where(kept, scale, scale - _COARSE_BIAS)
    return code, np.where(fits, wide + _FINE_BIAS, coarse_scale).astype(np.uint8)


def decode_root(codes: U8, scale: U8) -> F32:
    """Decode the codes of :func:`encode_root`; exact."""
    wide = scale.astype(np.uint32)
    kept = (scale == 0) | (scale == NOT_FINITE)
    fine = (scale >= FINE) & ~kept
    exponent = np.where(kept, wide, np.where(fine, wide - _FINE_BIAS, wide + _COARSE_BIAS))
    exponent = exponent.astype(np.uint8)
    is_fine = each(fine.astype(np.uint8), len(codes)) != 0
    return np.where(
        is_fine, decode_positive(codes, exponent, E2M2), decode_positive(codes, exponent, E3M1)
    )


def ratio(values: F32, root: F32) -> F32:
    """Returns values / root, with finite ratios clipped to +-RATIO_LIMIT.

    No ratio decodes to more than the limit, because the limit has an exact code in a block whose
    largest ratio is the limit.
    """
    unit = values / root
    over = np.isfinite(unit) & (np.abs(unit) > RATIO_LIMIT)
    return np.where(over, np.copysign(RATIO_LIMIT, unit), unit)


def _step(scale: U8) -> F32:
    """The step between the ratios of a block, from the scale of the block."""
    bits = (scale.astype(np.uint32) + _LEAST_STEP) << np.uint32(20)
    return np.where(scale == NOT_FINITE, np.uint32(0x7FC00000), bits).view(np.float32)


def encode_ratio(values: F32, random: U32) -> tuple[U8, U8]:
    """Encode ratios of at most RATIO_LIMIT as (codes, scales).

    A code is a sign bit above a number of steps, 0 to 7. The step of a block is the smallest float
    with three mantissa bits that is at least a seventh of the block's largest ratio and at least
    1.25 * 2^-32.
    """
    largest = largest_of(values, signed=True)
    least = (np.float32(7) * _step(np.zeros(1, np.uint8))).view(np.uint32)
    seventh = np.maximum(largest, least).view(np.float32) / np.float32(7)
    upper = (seventh.view(np.uint32) + np.uint32(0xFFFFF)) >> np.uint32(20)
    scale = (upper - _LEAST_STEP).astype(np.uint8)
    scale[largest >= INFINITY] = NOT_FINITE
    per_step = per_element(np.float32(65536) / _step(scale), len(values))
    finite = each(scale, len(values)) != NOT_FINITE
    bits = values.view(np.uint32)
    steps = (bits & MAGNITUDE).view(np.float32) * per_step
    whole = (np.where(finite, steps, np.float32(0)).astype(np.uint32) + random) >> np.uint32(16)
    code = np.where(finite, bits >> np.uint32(31) << np.uint32(3) | whole, np.uint32(1))
    return code.astype(np.uint8), scale


def decode_ratio(codes: U8, scale: U8) -> F32:
    """Decode the codes of :func:`encode_ratio`; exact."""
    stored = codes.astype(np.uint32)
    value = (stored & np.uint32(7)).astype(np.float32) * per_element(_step(scale), len(codes))
    return (value.view(np.uint32) | stored >> np.uint32(3) << np.uint32(31)).view(np.float32)


def pack(codes: U8) -> U8:
    """Pack two 4-bit codes per byte; code 2i is in the lower half of byte i."""
    even = np.zeros(-(-len(codes) // 2) * 2, np.uint8)
    even[: len(codes)] = codes
    return even[0::2] | (even[1::2] << np.uint8(4))


def unpack(packed: U8, count: int) -> U8:
    """Unpack the first ``count`` codes of a result of :func:`pack`."""
    codes = np.empty(len(packed) * 2, np.uint8)
    codes[0::2] = packed & np.uint8(15)
    codes[1::2] = packed >> np.uint8(4)
    return codes[:count]


def encode(values: F32, random: U32, moment: Moment) -> Stored:
    """Encode a state as (packed codes, scales); the kind of the moment selects the code."""
    if moment.kind == "second":
        codes, scale = encode_root(np.sqrt(values), random)
    elif moment.root is not None:
        codes, scale = encode_ratio(ratio(values, moment.root), random)
    else:
        codes, scale = encode_signed(values, random, E2M1)
    return pack(codes), scale


def decode(data: U8, scale: U8, count: int, moment: Moment) -> F32:
    """Decode the packed codes of :func:`encode` to ``count`` values."""
    codes = unpack(data, count)
    if moment.kind == "second":
        root = decode_root(codes, scale)
        return root * root
    if moment.root is not None:
        return decode_ratio(codes, scale) * moment.root
    return decode_signed(codes, scale, E2M1)


FORMAT = StateFormat(
    "mx4",
    code=6,
    dtype=torch.int8,
    encode=encode,
    decode=decode,
    stochastic=True,
    block=MX_BLOCK,
    scale=torch.uint8,
    packed=2,
    needs_root=True,
    readable_since=2,
    for_weights=FP32,
)
