"""The block formats of states in Triton, as mx8.py, mx4.py and dynamic8.py in
:mod:`onepass.formats` specify them.

Every format has ``decode(codes, scales, root, maps) -> values`` and ``encode(values, random, root,
maps) -> (codes, scales)``. They work on the elements of consecutive whole blocks. A block of 32
elements is within one warp, so its maximum needs only shuffles. mx4 codes relative first moments as
multiples of root; maps points to the tables of :data:`DYNAMIC_MAPS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import code_bytes, signed_code_bytes, upper_bytes
from .roots import in_range, over_code, root_of

MX_BLOCK = tl.constexpr(32)
DYNAMIC_BLOCK = tl.constexpr(256)
NOT_FINITE = tl.constexpr(255)  # the scale of a block that holds a NaN or an infinity

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(0x80000000)
_ONE = tl.constexpr(0x3F800000)
_FINE = tl.constexpr(132)  # scales of roots from here on select E2M2
_COARSE_BIAS = tl.constexpr(53)  # E3M1: lowest exponent - scale
_FINE_BIAS = tl.constexpr(66)  # E2M2: scale - lowest exponent
_RATIO_LIMIT = tl.constexpr(0x40E00000)  # the bits of 7.0
_LEAST_STEP = tl.constexpr(762)  # the upper 12 bits of the step of scale 0
_LEAST_LARGEST = tl.constexpr(0x310C0000)  # the bits of 7 times that step
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def largest_of(bits, SIZE: tl.constexpr):
    """The maximum of each block: [elements] -> [blocks]."""
    BLOCKS: tl.constexpr = bits.shape[0] // SIZE
    return tl.max(tl.reshape(bits, (BLOCKS, SIZE)), axis=1)


@triton.jit
def least_of(bits, SIZE: tl.constexpr):
    """The minimum of each block: [elements] -> [blocks]."""
    BLOCKS: tl.constexpr = bits.shape[0] // SIZE
    return tl.min(tl.reshape(bits, (BLOCKS, SIZE)), axis=1)


@triton.jit
def each(scales, SIZE: tl.constexpr):
    """The scale of each element: [blocks] -> [elements]."""
    BLOCKS: tl.constexpr = scales.shape[0]
    wide = tl.broadcast_to(tl.expand_dims(scales, 1), (BLOCKS, SIZE))
    return tl.reshape(wide, (BLOCKS * SIZE,))


# --- minifloats ------------------------------------------------------------------------------
# M: mantissa bits; SPAN: the number of binades of the codes, minus one. The arithmetic is that of
# the reference, except that it uses T, the bits of the block's lowest power of two, rather than the
# exponent: decoding shifts a code to the place of the mantissa and adds T.


@triton.jit
def lowest_binade(largest, M: tl.constexpr, SPAN: tl.constexpr, LEAST: tl.constexpr,
                  LIFT: tl.constexpr):  # fmt: skip
    """The scale of each block: the smallest, at least LEAST, at which the largest value has a code.

    The largest value is taken plus LIFT and rounded up.
    """
    top = (largest + ((1 << (23 - M)) - 1 + LIFT)) >> 23
    scale = tl.maximum(top.to(tl.int32), SPAN + LEAST) - SPAN
    return tl.where(largest >= _INFINITY, NOT_FINITE, scale).to(tl.uint32)


@triton.jit
def round_up(bits, random, lowest, M: tl.constexpr):
    """Rounds stochastically to M mantissa bits; returns signed codes relative to lowest."""
    steps = bits + (random << (7 - M)) - lowest
    return steps.to(tl.int32, bitcast=True) >> (23 - M)


@triton.jit
def finish(code, scales, M: tl.constexpr):
    """Sets the codes of non-finite blocks, and converts scales to bytes."""
    code = tl.where(each(scales, MX_BLOCK) == NOT_FINITE, 1 << (M - 1), code)
    return code.to(tl.uint32), scales.to(tl.uint8)


@triton.jit
def finite_of(scales):
    """For each element, whether its block is finite."""
    return each(scales, MX_BLOCK) != NOT_FINITE


@triton.jit
def signed_scales(magnitude, M: tl.constexpr, SPAN: tl.constexpr):
    return lowest_binade(largest_of(magnitude, MX_BLOCK), M, SPAN, 1, 1 << (23 - SPAN))


@triton.jit
def round_signed(magnitude, random, scales, M: tl.constexpr):
    """Codes of magnitudes, without their signs."""
    lowest = each(scales << 23, MX_BLOCK)
    lifted = magnitude.to(tl.float32, bitcast=True) + lowest.to(tl.float32, bitcast=True)
    code = round_up(lifted.to(tl.uint32, bitcast=True), random, lowest, M)
    return code.to(tl.uint32, bitcast=True)


@triton.jit
def decode_signed(upper, scales, M: tl.constexpr, WIDTH: tl.constexpr):
    """The values of codes in the upper bits of words. WIDTH: bits of a code below its sign."""
    lowest = each(scales.to(tl.uint32) << 23, MX_BLOCK)
    lifted = ((upper & _MAGNITUDE) >> (8 - WIDTH + M)) + lowest
    value = lifted.to(tl.float32, bitcast=True) - lowest.to(tl.float32, bitcast=True)
    return (value.to(tl.uint32, bitcast=True) | (upper & _SIGN)).to(tl.float32, bitcast=True)


# --- mx8: second moments in unsigned E5M3, first moments in signed E4M3 -----------------------


@triton.jit
def decode_mx8_second(codes, scales, root, maps):
    upper = upper_bytes(codes)
    bits = (upper >> 4) + each(scales.to(tl.uint32) << 23, MX_BLOCK)
    return tl.where(upper == 0, 0, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def encode_mx8_second(values, random, root, maps):
    """Only zero has code 0."""
    bits = values.to(tl.uint32, bitcast=True)
    scales = lowest_binade(largest_of(bits, MX_BLOCK), 3, 31, 0, 0)
    code = round_up(bits, random, each(scales << 23, MX_BLOCK), 3)
    # The minimum changes only the code of zero, because every other number has bits above its code.
    # Negative bits occur only in blocks with a NaN.
    code = tl.minimum(tl.maximum(code, 1), bits.to(tl.int32, bitcast=True))
    code = code.to(tl.uint32, bitcast=True)
    return code_bytes(code, finite_of(scales)), scales.to(tl.uint8)


@triton.jit
def decode_mx8_first(codes, scales, root, maps):
    return decode_signed(upper_bytes(codes), scales, 3, 7)


@triton.jit
def encode_mx8_first(values, random, root, maps):
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    scales = signed_scales(magnitude, 3, 15)
    code = round_signed(magnitude, random, scales, 3)
    return signed_code_bytes(code, bits, finite_of(scales)), scales.to(tl.uint8)


# --- mx4: square roots of second moments in unsigned E3M1 or E2M2 without a code for zero, relative
# first moments as ratios in 15 even steps, other first moments in signed E2M1 ---


@triton.jit
def root_unit(scales):
    """For each element: (bits of the block's lowest power of two, shift from code to mantissa)."""
    scales = scales.to(tl.uint32)
    kept = (scales == 0) | (scales == NOT_FINITE)
    fine = (scales >= _FINE) & (scales != NOT_FINITE)
    shifted = tl.where(fine, scales - _FINE_BIAS, scales + _COARSE_BIAS)
    exponent = tl.where(kept, scales, shifted).to(tl.uint32)
    return each(exponent << 23, MX_BLOCK), each(tl.where(fine, 21, 22).to(tl.uint32), MX_BLOCK)


@triton.jit
def root_mx4(codes, scales):
    """The square roots of second moments."""
    lowest, dropped = root_unit(scales)
    return ((codes << dropped) + lowest).to(tl.float32, bitcast=True)


@triton.jit
def decode_mx4_second(codes, scales, root, maps):
    value = root_mx4(codes, scales)
    return value * value


@triton.jit
def encode_mx4_second(values, random, root, maps):
    bits = root_of(values).to(tl.uint32, bitcast=True)
    largest = largest_of(bits, MX_BLOCK)
    fine = lowest_binade(largest, 2, 3, 54, 0)
    coarse = lowest_binade(largest, 1, 7, 54, 0) - _COARSE_BIAS
    fits = (least_of(bits, MX_BLOCK) >= (fine << 23)) & (fine >= _FINE - _FINE_BIAS)
    scales = tl.where(fits, fine + _FINE_BIAS, coarse)
    scales = tl.where(largest >= _INFINITY, NOT_FINITE, tl.where(largest == 0, 0, scales))
    scales = scales.to(tl.uint32)
    lowest, dropped = root_unit(scales)
    # In a block of zeros, lowest is 0, and the random bits alone do not reach the lowest code bit.
    code = (tl.maximum(bits, lowest) - lowest + (random << (dropped - 16))) >> dropped
    return finish(code, scales, 1)


@triton.jit
def decode_mx4_first(codes, scales, root, maps):
    return decode_signed(codes << 28, scales, 1, 3)


@triton.jit
def encode_mx4_first(values, random, root, maps):
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    scales = signed_scales(magnitude, 1, 3)
    code = round_signed(magnitude, random, scales, 1)
    return finish(code | ((bits & _SIGN) >> 28), scales, 1)


@triton.jit
def ratio_step(scales):
    """The step of the ratios of each block; NaN for a block that is not finite."""
    bits = (scales.to(tl.uint32) + _LEAST_STEP) << 20
    return tl.where(scales == NOT_FINITE, _NAN, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def decode_mx4_relative(codes, scales, root, maps):
    value = (codes & 7).to(tl.float32) * each(ratio_step(scales), MX_BLOCK)
    sign = (codes >> 3) << 31
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True) * root


@triton.jit
def encode_mx4_relative(values, random, root, maps):
    bits = over_code(values, root).to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    over = (magnitude > _RATIO_LIMIT) & (magnitude < _INFINITY)
    magnitude = tl.where(over, _RATIO_LIMIT, magnitude).to(tl.uint32)
    largest = largest_of(magnitude, MX_BLOCK)
    held = tl.maximum(largest, _LEAST_LARGEST).to(tl.float32, bitcast=True)
    seventh = in_range(held, tl.full(held.shape, 7.0, tl.float32))
    upper = (seventh.to(tl.uint32, bitcast=True) + 0xFFFFF) >> 20
    scales = tl.where(largest >= _INFINITY, NOT_FINITE, upper - _LEAST_STEP).to(tl.uint32)
    step = ratio_step(scales)
    per_step = each(in_range(tl.full(step.shape, 65536.0, tl.float32), step), MX_BLOCK)
    finite = each(scales, MX_BLOCK) != NOT_FINITE
    steps = tl.where(finite, magnitude.to(tl.float32, bitcast=True) * per_step, 0.0)
    code = (steps.to(tl.int32).to(tl.uint32, bitcast=True) + random) >> 16
    return finish(code | ((bits >> 31) << 3), scales, 1)


@triton.jit
def unpack(packed):
    """Unpacks words of two 4-bit codes; the lower one is the first."""
    COUNT: tl.constexpr = packed.shape[0] * 2
    return tl.reshape(tl.join(packed & 15, packed >> 4), (COUNT,))


@triton.jit
def pack(codes):
    """Packs 4-bit codes in pairs; the inverse of unpack."""
    PAIRS: tl.constexpr = codes.shape[0] // 2
    even, odd = tl.split(tl.reshape(codes, (PAIRS, 2)))
    return even | (odd << 4)


# --- dynamic8 --------------------------------------------------------------------------------

# The tables of a map, as csrc/formats/dynamic8.h describes them: 256 values, then the cells.
DYNAMIC_MAPS = ("signed", "unsigned")
_MAP = tl.constexpr(256 + 3072)  # 32-bit words
_LEAST_UNIT = tl.constexpr(0x34000000)  # the bits of 2^-23


@triton.jit
def decode_dynamic(codes, scales, map_ptr):
    return tl.load(map_ptr + codes.to(tl.int32)) * each(scales, DYNAMIC_BLOCK)


@triton.jit
def encode_dynamic(values, map_ptr, SIGNED: tl.constexpr):
    """The code of the nearest value, from one entry of the table of cells."""
    SHIFT: tl.constexpr = 17 if SIGNED else 16
    magnitudes = values.to(tl.uint32, bitcast=True) & _MAGNITUDE
    largest = largest_of(magnitudes, DYNAMIC_BLOCK)
    largest = tl.where(largest >= _INFINITY, _NAN, largest).to(tl.uint32)
    divisor = tl.where(largest == 0, _ONE, largest).to(tl.uint32).to(tl.float32, bitcast=True)
    unit = tl.div_rn(values, each(divisor, DYNAMIC_BLOCK))
    size = tl.abs(unit) if SIGNED else unit
    bits = tl.where(size > 2.0**-23, size.to(tl.uint32, bitcast=True), _LEAST_UNIT).to(tl.uint32)
    if SIGNED:
        bits = bits ^ tl.where(unit < 0, _MAGNITUDE, 0).to(tl.uint32)
    cell = (bits >> SHIFT).to(tl.int32) - (_LEAST_UNIT >> SHIFT)
    entry = tl.load(map_ptr + 256 + cell).to(tl.uint32, bitcast=True)
    code = (entry + (bits << (24 - SHIFT))) >> 24
    code = tl.where(unit == unit, code, 0)  # NaN: the block is not finite
    return code.to(tl.uint8), largest.to(tl.float32, bitcast=True)


@triton.jit
def decode_dynamic_signed(codes, scales, root, maps):
    return decode_dynamic(codes, scales, maps)


@triton.jit
def encode_dynamic_signed(values, random, root, maps):
    return encode_dynamic(values, maps, True)


@triton.jit
def decode_dynamic_unsigned(codes, scales, root, maps):
    return decode_dynamic(codes, scales, maps + _MAP)


@triton.jit
def encode_dynamic_unsigned(values, random, root, maps):
    return encode_dynamic(values, maps + _MAP, False)
