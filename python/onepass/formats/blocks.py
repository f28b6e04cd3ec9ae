"""The block formats of states, in NumPy: a block of elements in memory order shares one scale.

mx8 and mx4 take Microscaling's idea (OCP, "Microscaling formats (MX) specification", 2023): blocks
of 32 with a byte as scale, most often a power of two. Nearly all of it is integer arithmetic on the
bits of fp32: a code is the upper part of the float, its exponent counted from the scale byte, and
the bits below are rounded stochastically; only mx4's ratios are even steps. dynamic8 is the map and
block size of bitsandbytes (Dettmers et al., "8-bit optimizers via block-wise quantization", 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..numerics.arrays import F32, U8, U32

MX_BLOCK = 32
DYNAMIC_BLOCK = 256
NOT_FINITE = np.uint8(255)  # the scale of a block that holds a NaN or an infinity
LOWEST_ROOT = 54  # least scale of a root: the squares of 2^-73 and above are exact, and not zero

# The scales of roots: 0 of a block of zeros, from 1 of codes in E3M1, from FINE of codes in E2M2.
# What is left for the latter begins at roots of 2^-61.
FINE = 132
_COARSE_BIAS = np.uint32(LOWEST_ROOT - 1)  # from a scale to the lowest exponent
_FINE_BIAS = np.uint32(66)  # and from the lowest exponent to a scale

# Of |m| / sqrt(v). A step of Adam then is at most
#     sqrt((limit beta1)^2 / beta2 + (1 - beta1)^2 / (1 - beta2)) lr,
# by Cauchy and Schwarz: 7.1 lr at betas of 0.9 and 0.999, where exact averages allow 7.3. Without
# it, the noise of a ratio upon that of its root takes growing gradients to twice as much.
RATIO_LIMIT = np.float32(7)
# The upper 12 bits of the least step of a ratio, 1.25 * 2^-32. The largest, 1, has the scale 254:
# seven of them are RATIO_LIMIT.
_LEAST_STEP = np.uint32(762)

_INFINITY = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Minifloat:
    """A small float, its exponent counted from the scale of its block.

    Attributes:
        mantissa: bits of it.
        exponent: bits of it; the codes span that many powers of two.
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


E4M3 = Minifloat(4, 3)  # with a sign, lifted
E5M3 = Minifloat(5, 3)  # the code 0 is zero
E2M1 = Minifloat(2, 1)  # with a sign, lifted
E3M1 = Minifloat(3, 1)  # no zero, nor has
E2M2 = Minifloat(2, 2)


def _blocks(values: F32, size: int) -> F32:
    """[blocks, size], the last block filled up with zeros."""
    count = -(-len(values) // size)
    padded = np.zeros(count * size, np.float32)
    padded[: len(values)] = values
    return padded.reshape(count, size)


def _largest(values: F32, signed: bool) -> U32:
    """The bits of the largest of each block; of the largest magnitude where there are signs."""
    blocks = _blocks(values, MX_BLOCK).view(np.uint32)
    if signed:
        blocks = blocks & _MAGNITUDE
    return np.asarray(blocks.max(axis=1, initial=0), np.uint32)


def _lowest(largest: U32, small: Minifloat, least: int, lift: int = 0) -> U8:
    """The scale of each block: the biased exponent of the lowest binade, the smallest (but at least
    ``least``) at which the largest value, lifted and rounded up, still has a code."""
    span = np.uint32(small.binades - 1)
    top = (largest + np.uint32((1 << small.dropped) - 1 + lift)) >> np.uint32(23)
    scale = (np.maximum(top, span + np.uint32(least)) - span).astype(np.uint8)
    scale[largest >= _INFINITY] = NOT_FINITE
    return scale


def _spread(random: U32, small: Minifloat) -> U32:
    """16 random bits as the upper bits of those that are dropped."""
    return random << np.uint32(small.dropped - 16)


def _each(scale: U8, count: int) -> U32:
    """The scale of each element."""
    return np.repeat(scale.astype(np.uint32), MX_BLOCK)[:count]


def _each_float(of_blocks: F32, count: int) -> F32:
    """What is of each block, of each element."""
    return np.repeat(of_blocks, MX_BLOCK)[:count]


def encode_unsigned(values: F32, random: U32, small: Minifloat = E5M3) -> tuple[U8, U8]:
    """Values of at least +0 to (codes, scales): 0 is 0, anything else at least 1.

    A negative value, -0 included, makes its block NaN, as a NaN or infinity does.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    scale = _lowest(_largest(values, signed=False), small, 0)
    e = _each(scale, len(values))
    bits = values.view(np.uint32)
    rounded = ((bits + _spread(random, small)) >> dropped).astype(np.int64)
    code = np.minimum(np.maximum(rounded - (e << m), 1), bits)
    code = np.where(e == NOT_FINITE, 1 << (small.mantissa - 1), code)
    return code.astype(np.uint8), scale


def decode_unsigned(codes: U8, scale: U8, small: Minifloat = E5M3) -> F32:
    """What :func:`encode_unsigned` wrote: exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    code = codes.astype(np.uint32)
    bits = (code + (_each(scale, len(codes)) << m)) << dropped
    return np.where(code == 0, np.uint32(0), bits).view(np.float32)


def encode_positive(values: F32, random: U32, small: Minifloat = E3M1) -> tuple[U8, U8]:
    """Values of at least +0 to (codes, scales), without a code for zero.

    What is below the lowest code takes that code; a block of zeros has scale 0 and codes of 0, any
    other a scale of at least LOWEST_ROOT. Negative values and those that are not finite as in
    :func:`encode_unsigned`.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    largest = _largest(values, signed=False)
    scale = _lowest(largest, small, LOWEST_ROOT)
    scale[largest == 0] = 0
    e = _each(scale, len(values))
    bits = np.maximum(values.view(np.uint32), e << np.uint32(23))
    code = ((bits + _spread(random, small)) >> dropped) - (e << m)
    code = np.where(e == NOT_FINITE, np.uint32(1 << (small.mantissa - 1)), code)
    return code.astype(np.uint8), scale


def decode_positive(codes: U8, scale: U8, small: Minifloat = E3M1) -> F32:
    """What :func:`encode_positive` wrote: exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    e = _each(scale, len(codes))
    return ((codes.astype(np.uint32) + (e << m)) << dropped).view(np.float32)


def encode_root(values: F32, random: U32) -> tuple[U8, U8]:
    """Roots of second moments to (codes, scales): in E2M2 a block of which all 32 lie within the
    codes' range, of eight to fourteen, in E3M1 any other. The rest as in encode_positive.

    The scale says which; it has values for E2M2 from a lowest power of two of 2^-61.
    """
    coarse, scale = encode_positive(values, random, E3M1)
    fine, exponent = encode_positive(values, random, E2M2)
    least = _blocks(values, MX_BLOCK).view(np.uint32).min(axis=1, initial=_MAGNITUDE)
    wide = exponent.astype(np.uint32)
    fits = (least >= wide << np.uint32(23)) & (wide >= FINE - _FINE_BIAS) & (wide != NOT_FINITE)
    code = np.where(_each(fits.astype(np.uint8), len(values)) != 0, fine, coarse)
    kept = (scale == 0) | (scale == NOT_FINITE)
    coarse_scale = np.where(kept, scale, scale - _COARSE_BIAS)
    return code, np.where(fits, wide + _FINE_BIAS, coarse_scale).astype(np.uint8)


def decode_root(codes: U8, scale: U8) -> F32:
    """What :func:`encode_root` wrote: exact."""
    wide = scale.astype(np.uint32)
    kept = (scale == 0) | (scale == NOT_FINITE)
    fine = (scale >= FINE) & ~kept
    exponent = np.where(kept, wide, np.where(fine, wide - _FINE_BIAS, wide + _COARSE_BIAS))
    exponent = exponent.astype(np.uint8)
    is_fine = _each(fine.astype(np.uint8), len(codes)) != 0
    return np.where(
        is_fine, decode_positive(codes, exponent, E2M2), decode_positive(codes, exponent, E3M1)
    )


def ratio(values: F32, root: F32) -> F32:
    """values / root as mx4 codes it: finite ones held to RATIO_LIMIT, which is a code of the block
    whose largest it is, so that nothing decodes to more."""
    unit = values / root
    over = np.isfinite(unit) & (np.abs(unit) > RATIO_LIMIT)
    return np.where(over, np.copysign(RATIO_LIMIT, unit), unit)


def _step(scale: U8) -> F32:
    """The step of the ratios of a block."""
    bits = (scale.astype(np.uint32) + _LEAST_STEP) << np.uint32(20)
    return np.where(scale == NOT_FINITE, np.uint32(0x7FC00000), bits).view(np.float32)


def encode_ratio(values: F32, random: U32) -> tuple[U8, U8]:
    """Ratios, of at most RATIO_LIMIT, to (codes, scales): a sign above the number of steps, 0 to 7.

    The step is the least float of three bits of mantissa, and of at least 1.25 * 2^-32, that is a
    seventh of the block's largest or more.
    """
    largest = _largest(values, signed=True)
    least = (np.float32(7) * _step(np.zeros(1, np.uint8))).view(np.uint32)
    seventh = np.maximum(largest, least).view(np.float32) / np.float32(7)
    upper = (seventh.view(np.uint32) + np.uint32(0xFFFFF)) >> np.uint32(20)
    scale = (upper - _LEAST_STEP).astype(np.uint8)
    scale[largest >= _INFINITY] = NOT_FINITE
    per_step = _each_float(np.float32(65536) / _step(scale), len(values))
    finite = _each(scale, len(values)) != NOT_FINITE
    bits = values.view(np.uint32)
    steps = (bits & _MAGNITUDE).view(np.float32) * per_step
    whole = (np.where(finite, steps, np.float32(0)).astype(np.uint32) + random) >> np.uint32(16)
    code = np.where(finite, bits >> np.uint32(31) << np.uint32(3) | whole, np.uint32(1))
    return code.astype(np.uint8), scale


def decode_ratio(codes: U8, scale: U8) -> F32:
    """What :func:`encode_ratio` wrote: exact."""
    stored = codes.astype(np.uint32)
    value = (stored & np.uint32(7)).astype(np.float32) * _each_float(_step(scale), len(codes))
    return (value.view(np.uint32) | stored >> np.uint32(3) << np.uint32(31)).view(np.float32)


def encode_signed(values: F32, random: U32, small: Minifloat) -> tuple[U8, U8]:
    """Values of any sign to (codes, scales), the sign in the bit above the magnitude.

    A magnitude is lifted by T, the lowest power of two of the code, and then coded without
    denormals: codes lie evenly below T, down to zero, and come to lie as a float's do far above.
    """
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    # T, in units of the last place of the largest value that shares the top binade.
    lift = 1 << (23 - (small.binades - 1))
    scale = _lowest(_largest(values, signed=True), small, 1, lift)
    e = _each(scale, len(values))
    bits = values.view(np.uint32)
    lowest = (e << np.uint32(23)).view(np.float32)
    lifted = ((bits & _MAGNITUDE).view(np.float32) + lowest).view(np.uint32)
    code = ((lifted + _spread(random, small)) >> dropped) - (e << m)
    sign = bits >> np.uint32(31) << np.uint32(small.exponent + small.mantissa)
    code = np.where(e == NOT_FINITE, np.uint32(1 << (small.mantissa - 1)), sign | code)
    return code.astype(np.uint8), scale


def decode_signed(codes: U8, scale: U8, small: Minifloat) -> F32:
    """What :func:`encode_signed` wrote: exact."""
    m, dropped = np.uint32(small.mantissa), np.uint32(small.dropped)
    width = np.uint32(small.exponent + small.mantissa)
    stored = codes.astype(np.uint32)
    code = stored & ((np.uint32(1) << width) - np.uint32(1))
    e = _each(scale, len(codes))
    lifted = ((code + (e << m)) << dropped).view(np.float32)
    value = lifted - (e << np.uint32(23)).view(np.float32)
    return (value.view(np.uint32) | stored >> width << np.uint32(31)).view(np.float32)


def pack(codes: U8) -> U8:
    """4-bit codes, two in a byte: element 2i in the lower half of byte i."""
    even = np.zeros(-(-len(codes) // 2) * 2, np.uint8)
    even[: len(codes)] = codes
    return even[0::2] | (even[1::2] << np.uint8(4))


def unpack(packed: U8, count: int) -> U8:
    """What :func:`pack` packed."""
    codes = np.empty(len(packed) * 2, np.uint8)
    codes[0::2] = packed & np.uint8(15)
    codes[1::2] = packed >> np.uint8(4)
    return codes[:count]


# --- dynamic8 --------------------------------------------------------------------------------


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


def encode_dynamic(values: F32, signed: bool) -> tuple[U8, F32]:
    """Values to (codes, largest magnitude of each block of 256): the nearest value of the map."""
    largest = np.abs(_blocks(values, DYNAMIC_BLOCK)).max(axis=1, initial=0)
    largest = np.where(np.isfinite(largest), largest, np.float32("nan")).astype(np.float32)
    each = np.repeat(largest, DYNAMIC_BLOCK)[: len(values)]
    unit = values / np.where(each == 0, np.float32(1), each)
    codes = np.searchsorted(dynamic_edges(signed), unit, side="left")
    return np.where(np.isnan(each), 0, codes).astype(np.uint8), largest


def decode_dynamic(codes: U8, largest: F32, signed: bool) -> F32:
    """What :func:`encode_dynamic` wrote."""
    return dynamic_map(signed)[codes] * np.repeat(largest, DYNAMIC_BLOCK)[: len(codes)]
