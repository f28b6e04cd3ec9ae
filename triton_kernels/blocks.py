"""The block formats of states in Triton, as :mod:`onepass.reference.blocks` has them.

``decode(codes, scales, root, maps) -> values`` and ``encode(values, random, root, maps) -> (codes,
scales)`` on the elements of whole blocks, one after another. A block of 32 rests within one warp,
so its maximum is taken by shuffles. root is what mx4 measures relative first moments in; maps holds
the rows of :data:`DYNAMIC_TABLES`.
"""

from __future__ import annotations

import triton
import triton.language as tl

MX_BLOCK = tl.constexpr(32)
DYNAMIC_BLOCK = tl.constexpr(256)
NOT_FINITE = tl.constexpr(255)  # the scale of a block that holds a NaN or an infinity

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ONE = tl.constexpr(0x3F800000)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def largest_of(bits, SIZE: tl.constexpr):
    """The largest magnitude of each block, as bits: [elements] -> [blocks]."""
    BLOCKS: tl.constexpr = bits.shape[0] // SIZE
    magnitudes = (bits & _MAGNITUDE).to(tl.int32, bitcast=True)
    return tl.max(tl.reshape(magnitudes, (BLOCKS, SIZE)), axis=1).to(tl.uint32, bitcast=True)


@triton.jit
def each(scales, SIZE: tl.constexpr):
    """The scale of each element: [blocks] -> [elements]."""
    BLOCKS: tl.constexpr = scales.shape[0]
    wide = tl.broadcast_to(tl.expand_dims(scales, 1), (BLOCKS, SIZE))
    return tl.reshape(wide, (BLOCKS * SIZE,))


# --- minifloats ------------------------------------------------------------------------------
# M: bits of the mantissa; SPAN: the powers of two of normal codes, less one.


@triton.jit
def lowest_binade(largest, LEAST: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr):
    """The scale: the smallest at which the block's largest value, rounded up, has a code."""
    top = (largest + ((1 << (23 - M)) - 1)) >> 23
    scale = tl.maximum(top.to(tl.int32) - SPAN, LEAST).to(tl.uint32)
    return tl.where(largest >= _INFINITY, NOT_FINITE, scale)


@triton.jit
def round_up(bits, random, e, M: tl.constexpr):
    """Stochastically to M bits of mantissa; the exponent counted from e."""
    return ((bits + (random << (7 - M))) >> (23 - M)) - (e << M)


@triton.jit
def encode_unsigned(values, random, M: tl.constexpr, SPAN: tl.constexpr):
    bits = values.to(tl.uint32, bitcast=True)
    scales = lowest_binade(largest_of(bits, MX_BLOCK), 0, M, SPAN)
    e = each(scales, MX_BLOCK)
    code = round_up(bits, random, e, M).to(tl.int32, bitcast=True)
    code = tl.where((bits & _MAGNITUDE) == 0, 0, tl.maximum(code, 1))
    code = tl.where(e == NOT_FINITE, 1 << (M - 1), code)
    return code.to(tl.uint8), scales.to(tl.uint8)


@triton.jit
def decode_unsigned(codes, scales, M: tl.constexpr):
    code = codes.to(tl.uint32)
    e = each(scales.to(tl.uint32), MX_BLOCK)
    bits = (code + (e << M)) << (23 - M)
    return tl.where(code == 0, 0, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def encode_positive(values, random, M: tl.constexpr, SPAN: tl.constexpr):
    bits = values.to(tl.uint32, bitcast=True) & _MAGNITUDE
    largest = largest_of(bits, MX_BLOCK)
    scales = tl.where(largest == 0, 0, lowest_binade(largest, 1, M, SPAN)).to(tl.uint32)
    e = each(scales, MX_BLOCK)
    code = round_up(tl.maximum(bits, e << 23), random, e, M)
    code = tl.where(e == 0, 0, code)
    code = tl.where(e == NOT_FINITE, 1 << (M - 1), code)
    return code.to(tl.uint8), scales.to(tl.uint8)


@triton.jit
def decode_positive(codes, scales, M: tl.constexpr):
    e = each(scales.to(tl.uint32), MX_BLOCK)
    bits = (codes.to(tl.uint32) + (e << M)) << (23 - M)
    return tl.where(e == 0, 0, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def encode_signed(values, random, M: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH: bits of a code below its sign."""
    bits = values.to(tl.uint32, bitcast=True)
    scales = lowest_binade(largest_of(bits, MX_BLOCK), 1, M, SPAN)
    e = each(scales, MX_BLOCK)
    magnitude = bits & _MAGNITUDE
    lowest = e << 23
    denormal = magnitude < lowest
    lifted = magnitude.to(tl.float32, bitcast=True) + lowest.to(tl.float32, bitcast=True)
    code = round_up(
        tl.where(denormal, lifted.to(tl.uint32, bitcast=True), magnitude), random, e, M
    )
    code = tl.where(denormal, code, code + (1 << M))
    code = tl.where(e == NOT_FINITE, (1 << M) + (1 << (M - 1)), code)
    return ((bits >> 31 << WIDTH) | code).to(tl.uint8), scales.to(tl.uint8)


@triton.jit
def decode_signed(codes, scales, M: tl.constexpr, WIDTH: tl.constexpr):
    code = codes.to(tl.uint32) & ((1 << WIDTH) - 1)
    sign = codes.to(tl.uint32) >> WIDTH << 31
    e = each(scales.to(tl.uint32), MX_BLOCK)
    normal = code >= (1 << M)
    steps = tl.where(normal, code - (1 << M), code) + (e << M)
    value = (steps << (23 - M)).to(tl.float32, bitcast=True)
    value = tl.where(normal, value, value - (e << 23).to(tl.float32, bitcast=True))
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


# --- mx8: second moments E5M3 without a sign, first moments E4M3 with one ---------------------


@triton.jit
def decode_mx8_second(codes, scales, root, maps):
    return decode_unsigned(codes, scales, 3)


@triton.jit
def encode_mx8_second(values, random, root, maps):
    return encode_unsigned(values, random, 3, 31)


@triton.jit
def decode_mx8_first(codes, scales, root, maps):
    return decode_signed(codes, scales, 3, 7)


@triton.jit
def encode_mx8_first(values, random, root, maps):
    return encode_signed(values, random, 3, 14, 7)


# --- mx4: roots of second moments E3M1 without a zero, first moments E2M1 with a sign ----------


@triton.jit
def root_mx4(codes, scales):
    """What second moments are the squares of."""
    return decode_positive(codes, scales, 1)


@triton.jit
def decode_mx4_second(codes, scales, root, maps):
    value = decode_positive(codes, scales, 1)
    return value * value


@triton.jit
def encode_mx4_second(values, random, root, maps):
    return encode_positive(tl.sqrt_rn(values), random, 1, 7)


@triton.jit
def decode_mx4_first(codes, scales, root, maps):
    return decode_signed(codes, scales, 1, 3)


@triton.jit
def encode_mx4_first(values, random, root, maps):
    return encode_signed(values, random, 1, 2, 3)


@triton.jit
def decode_mx4_relative(codes, scales, root, maps):
    return decode_signed(codes, scales, 1, 3) * root


@triton.jit
def encode_mx4_relative(values, random, root, maps):
    return encode_signed(tl.div_rn(values, root), random, 1, 2, 3)


@triton.jit
def unpack(packed):
    """4-bit codes, two in a byte, the lower half first."""
    COUNT: tl.constexpr = packed.shape[0] * 2
    return tl.reshape(tl.join(packed & 15, packed >> 4), (COUNT,))


@triton.jit
def pack(codes):
    BYTES: tl.constexpr = codes.shape[0] // 2
    even, odd = tl.split(tl.reshape(codes, (BYTES, 2)))
    return even | (odd << 4)


# --- dynamic8 --------------------------------------------------------------------------------

DYNAMIC_TABLES = ("signed values", "signed edges", "unsigned values", "unsigned edges")


@triton.jit
def decode_dynamic(codes, scales, values_ptr):
    return tl.load(values_ptr + codes.to(tl.int32)) * each(scales, DYNAMIC_BLOCK)


@triton.jit
def encode_dynamic(values, edges_ptr):
    """The nearest value, by a binary search of the midpoints without branches."""
    largest = largest_of(values.to(tl.uint32, bitcast=True), DYNAMIC_BLOCK)
    largest = tl.where(largest >= _INFINITY, _NAN, largest).to(tl.uint32)
    divisor = tl.where(largest == 0, _ONE, largest).to(tl.uint32).to(tl.float32, bitcast=True)
    unit = tl.div_rn(values, each(divisor, DYNAMIC_BLOCK))
    code = tl.zeros(values.shape, tl.int32)
    for i in tl.static_range(8):
        step = 128 >> i
        code += tl.where(unit > tl.load(edges_ptr + code + (step - 1)), step, 0)
    return code.to(tl.uint8), largest.to(tl.float32, bitcast=True)


@triton.jit
def decode_dynamic_signed(codes, scales, root, maps):
    return decode_dynamic(codes, scales, maps)


@triton.jit
def encode_dynamic_signed(values, random, root, maps):
    return encode_dynamic(values, maps + 256)


@triton.jit
def decode_dynamic_unsigned(codes, scales, root, maps):
    return decode_dynamic(codes, scales, maps + 512)


@triton.jit
def encode_dynamic_unsigned(values, random, root, maps):
    return encode_dynamic(values, maps + 768)
