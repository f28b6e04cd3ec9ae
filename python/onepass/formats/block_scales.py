"""The common part of mx8 and mx4: blocks of 32 consecutive elements with a one-byte scale.

Source: OCP, "Microscaling formats (MX) specification" (2023). The scale of a block of minifloats is
a power of two, so encoding is integer arithmetic on the bits of fp32. A code is the upper bits of
the float, with the exponent counted from the scale byte; the lower bits are rounded stochastically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..numerics.arrays import F32, U8, U32

MX_BLOCK = 32
NOT_FINITE = np.uint8(255)  # the scale of a block that holds a NaN or an infinity
INFINITY = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Minifloat:
    """A small float format whose exponent is relative to the scale of the block.

    Attributes:
        exponent: the number of exponent bits.
        mantissa: the number of mantissa bits.
    """

    exponent: int
    mantissa: int

    @property
    def binades(self) -> int:
        """The number of binades (powers of two) that the codes cover."""
        return 1 << self.exponent

    @property
    def dropped(self) -> int:
        """The number of fp32 mantissa bits that the code drops."""
        return 23 - self.mantissa


def blocks_of(values: F32, size: int) -> F32:
    """The values as [blocks, size], with the last block padded with zeros."""
    count = -(-len(values) // size)
    padded = np.zeros(count * size, np.float32)
    padded[: len(values)] = values
    return padded.reshape(count, size)


def largest_of(values: F32, signed: bool) -> U32:
    """The bits of the largest value of each block, or of the largest magnitude if ``signed``."""
    blocks = blocks_of(values, MX_BLOCK).view(np.uint32)
    if signed:
        blocks = blocks & MAGNITUDE
    return np.asarray(blocks.max(axis=1, initial=0), np.uint32)


def lowest_binade(largest: U32, small: Minifloat, least: int, lift: int = 0) -> U8:
    """The scale of each block, which is the biased exponent of the block's lowest binade.

    This is the smallest scale, but at least ``least``, for which the largest value has a code. The
    test adds ``lift`` to the bits of the largest value and then rounds the value up.
    """
    span = np.uint32(small.binades - 1)
    top = (largest + np.uint32((1 << small.dropped) - 1 + lift)) >> np.uint32(23)
    scale = (np.maximum(top, span + np.uint32(least)) - span).astype(np.uint8)
    scale[largest >= INFINITY] = NOT_FINITE
    return scale


def spread(random: U32, small: Minifloat) -> U32:
    """Shifts 16 random bits to the upper end of the dropped bits."""
    return random << np.uint32(small.dropped - 16)


def each(scale: U8, count: int) -> U32:
    """The scale of its block for each of ``count`` elements."""
    return np.repeat(scale.astype(np.uint32), MX_BLOCK)[:count]


def encode_signed(values: F32, random: U32, small: Minifloat) -> tuple[U8, U8]:
    """Encode signed values as (codes, scales), with the sign in the bit above the magnitude.

    T, the lowest power of two of the codes, is added to a magnitude before it is encoded as a float
    without denormals. Codes are therefore evenly spaced from zero to T, and approach the spacing of
    a float far above T.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    # T, in units in the last place (ulp) of a largest value in the top binade.
    lift = 1 << (23 - (small.binades - 1))
    scale = lowest_binade(largest_of(values, signed=True), small, 1, lift)
    e = each(scale, len(values))
    bits = values.view(np.uint32)
    lowest = (e << np.uint32(23)).view(np.float32)
    lifted = ((bits & MAGNITUDE).view(np.float32) + lowest).view(np.uint32)
    code = ((lifted + spread(random, small)) >> dropped) - (e << m)
    sign = bits >> np.uint32(31) << np.uint32(small.exponent + small.mantissa)
    code = np.where(e == NOT_FINITE, np.uint32(1 << (small.mantissa - 1)), sign | code)
    return code.astype(np.uint8), scale


def decode_signed(codes: U8, scale: U8, small: Minifloat) -> F32:
    """Decode the codes of :func:`encode_signed`; exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    width = np.uint32(small.exponent + small.mantissa)
    stored = codes.astype(np.uint32)
    code = stored & ((np.uint32(1) << width) - np.uint32(1))
    e = each(scale, len(codes))
    lifted = ((code + (e << m)) << dropped).view(np.float32)
    value = lifted - (e << np.uint32(23)).view(np.float32)
    return (value.view(np.uint32) | stored >> width << np.uint32(31)).view(np.float32)
