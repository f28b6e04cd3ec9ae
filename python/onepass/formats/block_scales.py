"""What mx8 and mx4 share: blocks of 32 elements in memory order with a byte as scale.

The idea is Microscaling's (OCP, "Microscaling formats (MX) specification", 2023). The scale of a
minifloat is a power of two, so that encoding is integer arithmetic on the bits of fp32: a code is
the upper part of the float, its exponent counted from the scale byte, and the bits below are
rounded stochastically.
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
    """A small float, its exponent counted from the scale of its block.

    Attributes:
        exponent: bits of it; the codes span that many powers of two.
        mantissa: bits of it.
    """

    exponent: int
    mantissa: int

    @property
    def binades(self) -> int:
        """Powers of two that the codes span."""
        return 1 << self.exponent

    @property
    def dropped(self) -> int:
        """Bits of an fp32 below the code's last."""
        return 23 - self.mantissa


def blocks_of(values: F32, size: int) -> F32:
    """The values as [blocks, size], the last block filled up with zeros."""
    count = -(-len(values) // size)
    padded = np.zeros(count * size, np.float32)
    padded[: len(values)] = values
    return padded.reshape(count, size)


def largest_of(values: F32, signed: bool) -> U32:
    """The bits of the largest value of each block; of the largest magnitude if signed."""
    blocks = blocks_of(values, MX_BLOCK).view(np.uint32)
    if signed:
        blocks = blocks & MAGNITUDE
    return np.asarray(blocks.max(axis=1, initial=0), np.uint32)


def lowest_binade(largest: U32, small: Minifloat, least: int, lift: int = 0) -> U8:
    """The scale of each block, which is the biased exponent of its lowest binade: the smallest, but
    at least ``least``, at which the largest value, lifted and rounded up, has a code."""
    span = np.uint32(small.binades - 1)
    top = (largest + np.uint32((1 << small.dropped) - 1 + lift)) >> np.uint32(23)
    scale = (np.maximum(top, span + np.uint32(least)) - span).astype(np.uint8)
    scale[largest >= INFINITY] = NOT_FINITE
    return scale


def spread(random: U32, small: Minifloat) -> U32:
    """16 random bits, shifted to the upper end of the dropped bits."""
    return random << np.uint32(small.dropped - 16)


def each(scale: U8, count: int) -> U32:
    """The scale of each element."""
    return np.repeat(scale.astype(np.uint32), MX_BLOCK)[:count]


def encode_signed(values: F32, random: U32, small: Minifloat) -> tuple[U8, U8]:
    """Encode values of any sign as (codes, scales), the sign in the bit above the magnitude.

    A magnitude is lifted by T, the lowest power of two of the code, and then coded without
    denormals: codes lie evenly below T, down to zero, and come to lie as a float's do far above.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    # T, in units of the last place of the largest value that shares the top binade.
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
    """Decode the codes of :func:`encode_signed`: exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    width = np.uint32(small.exponent + small.mantissa)
    stored = codes.astype(np.uint32)
    code = stored & ((np.uint32(1) << width) - np.uint32(1))
    e = each(scale, len(codes))
    lifted = ((code + (e << m)) << dropped).view(np.float32)
    value = lifted - (e << np.uint32(23)).view(np.float32)
    return (value.view(np.uint32) | stored >> width << np.uint32(31)).view(np.float32)
