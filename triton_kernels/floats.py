"""fp32, bf16 and fp16 in Triton, and weights with companions, as :mod:`onepass.formats` specifies
them.

Every format has ``decode(codes, companion, root, maps) -> values`` and ``encode(values, random,
root, maps) -> (codes, companion)``. A format ignores the arguments that only other formats use.

16-bit codes and companions are the upper halves of 32-bit words, so that a bf16 code is the bits
of its value, and rounding is integer arithmetic with the same result in the interpreter and on
every GPU. The lower halves of the words are zero in the arguments of decode, and ignored in the
results of encode. A format without companions returns 0 for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_UPPER = tl.constexpr(0xFFFF0000)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def from_fp32(values):
    return values


@triton.jit
def from_bf16(codes):
    """The values of 16-bit codes."""
    return (codes.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def from_fp16(codes):
    """The values of 16-bit codes."""
    return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bits_of(values):
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def value_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unless_nan(values, words):
    """The words; the code of a NaN for a NaN."""
    return tl.where(values != values, _NAN, words).to(tl.uint32)


@triton.jit
def to_bf16(values):
    """Rounds to nearest, ties to even."""
    bits = bits_of(values)
    return unless_nan(values, bits + (0x7FFF + ((bits >> 16) & 1)))


@triton.jit
def to_bf16_half_away(values):
    """Rounds to nearest, ties away from zero."""
    return unless_nan(values, bits_of(values) + 0x8000)


@triton.jit
def value_of_fp16(words):
    return from_fp16((words >> 16).to(tl.uint16))


@triton.jit
def to_fp16(values):
    return values.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def decode_fp32(values, companion, root, maps):
    return from_fp32(values)


@triton.jit
def encode_fp32(values, random, root, maps):
    return values, 0


@triton.jit
def decode_bf16(codes, companion, root, maps):
    return value_of(codes)


@triton.jit
def encode_bf16(values, random, root, maps):
    return to_bf16(values), 0


@triton.jit
def encode_bf16_stochastic(values, random, root, maps):
    return unless_nan(values, bits_of(values) + random), 0


@triton.jit
def decode_fp16(codes, companion, root, maps):
    return value_of_fp16(codes)


@triton.jit
def encode_fp16(values, random, root, maps):
    return to_fp16(values), 0


@triton.jit
def encode_fp16_stochastic(values, random, root, maps):
    bits = bits_of(values)
    magnitude = bits & _MAGNITUDE
    small = magnitude < 0x38800000
    # fp32 numbers just above 2^-14 have 13 bits below the spacing of the denormals of fp16, so 13
    # bits are dropped in this case too.
    shifted = value_of(magnitude) + tl.full((), 2.0**-14, tl.float32)
    shifted = bits_of(shifted) - (113 << 23)
    code = (tl.where(small, shifted, magnitude - (112 << 23)) + (random >> 3)) >> 13
    code = tl.where(magnitude >= 0x47800000, 0x7C00, code)
    code = tl.where(magnitude > _INFINITY, 0x7E00, code).to(tl.uint32)
    return (bits & 0x80000000) | (code << 16), 0


# --- weights with companions -----------------------------------------------------------------


@triton.jit
def rest(values, near):
    """The rounding error values - near; 0 for an infinity or NaN."""
    finite = (bits_of(near) & _MAGNITUDE) < _INFINITY
    return tl.where(finite, values - near, 0.0)


@triton.jit
def decode_kahan_bf16(codes, companion, root, maps):
    return value_of(codes) + value_of(companion)


@triton.jit
def encode_kahan_bf16(values, random, root, maps):
    codes = to_bf16(values)
    return codes, to_bf16(rest(values, value_of(codes & _UPPER)))


@triton.jit
def decode_kahan_fp16(codes, companion, root, maps):
    return value_of_fp16(codes) + value_of_fp16(companion)


@triton.jit
def encode_kahan_fp16(values, random, root, maps):
    codes = to_fp16(values)
    return codes, to_fp16(rest(values, value_of_fp16(codes)))


@triton.jit
def decode_master_bf16(codes, companion, root, maps):
    """The master weight, unless the weight was changed outside onepass and takes precedence."""
    return tl.where((to_bf16_half_away(companion) & _UPPER) == codes, companion, value_of(codes))


@triton.jit
def encode_master_bf16(values, random, root, maps):
    return to_bf16_half_away(values), values


@triton.jit
def decode_master_fp16(codes, companion, root, maps):
    """The master weight, unless the weight was changed outside onepass and takes precedence."""
    return tl.where(to_fp16(companion) == codes, companion, value_of_fp16(codes))


@triton.jit
def encode_master_fp16(values, random, root, maps):
    return to_fp16(values), values


@triton.jit
def joined(codes, low):
    """The fp32 whose bits are codes + low, for an int32 low of 16 bits.

    A negative low under a zero weight is stale: the weight was set to zero after the step. It is
    treated as 0. Only such a sum has all of the 16 bits below the sign set.
    """
    bits = codes + low.to(tl.uint32, bitcast=True)
    return value_of(tl.where((bits + bits) >= _UPPER, codes, bits).to(tl.uint32))


@triton.jit
def decode_split16(codes, companion, root, maps):
    return joined(codes, companion.to(tl.int32, bitcast=True) >> 16)


@triton.jit
def encode_split16(values, random, root, maps):
    low = tl.where(values != values, 0, bits_of(values)).to(tl.uint32)
    return to_bf16_half_away(values), low << 16


@triton.jit
def decode_split8(codes, companion, root, maps):
    return joined(codes, companion.to(tl.int8, bitcast=True).to(tl.int32) * 256)


@triton.jit
def encode_split8(values, random, root, maps):
    rounded = bits_of(values) + (random & 0xFF)
    low = tl.where(values != values, 0, rounded >> 8)
    return unless_nan(values, rounded + 0x8000), low.to(tl.uint8)
