"""fp32, bf16 and fp16 in Triton, and weights with companions, as :mod:`onepass.formats` specifies
them.

Every format has ``decode(codes, companion, root, maps) -> values`` and ``encode(values, random,
root, maps) -> (codes, companion)``. A format ignores the arguments that only other formats use.
16-bit floats are stored as unsigned codes, so that rounding is integer arithmetic with the same
result in the interpreter and on every GPU. A format without companions returns 0 for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def from_fp32(values):
    return values


@triton.jit
def from_bf16(codes):
    return (codes.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(values):
    """Rounds to nearest, ties to even."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return tl.where(values != values, 0x7FC0, rounded >> 16).to(tl.uint16)


@triton.jit
def to_bf16_half_away(values):
    """Rounds to nearest, ties away from zero."""
    rounded = values.to(tl.uint32, bitcast=True) + 0x8000
    return tl.where(values != values, 0x7FC0, rounded >> 16).to(tl.uint16)


@triton.jit
def from_fp16(codes):
    return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_fp16(values):
    return values.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def decode_fp32(values, companion, root, maps):
    return from_fp32(values)


@triton.jit
def encode_fp32(values, random, root, maps):
    return values, 0


@triton.jit
def decode_bf16(codes, companion, root, maps):
    return from_bf16(codes)


@triton.jit
def encode_bf16(values, random, root, maps):
    return to_bf16(values), 0


@triton.jit
def encode_bf16_stochastic(values, random, root, maps):
    rounded = values.to(tl.uint32, bitcast=True) + random
    return tl.where(values != values, 0x7FC0, rounded >> 16).to(tl.uint16), 0


@triton.jit
def decode_fp16(codes, companion, root, maps):
    return from_fp16(codes)


@triton.jit
def encode_fp16(values, random, root, maps):
    return to_fp16(values), 0


@triton.jit
def encode_fp16_stochastic(values, random, root, maps):
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    small = magnitude < 0x38800000
    # fp32 numbers just above 2^-14 have 13 bits below the spacing of the denormals of fp16, so 13
    # bits are dropped in this case too.
    shifted = magnitude.to(tl.float32, bitcast=True) + tl.full((), 2.0**-14, tl.float32)
    shifted = shifted.to(tl.uint32, bitcast=True) - (113 << 23)
    code = (tl.where(small, shifted, magnitude - (112 << 23)) + (random >> 3)) >> 13
    code = tl.where(magnitude >= 0x47800000, 0x7C00, code)
    code = tl.where(magnitude > _INFINITY, 0x7E00, code)
    return (((bits >> 16) & 0x8000) | code).to(tl.uint16), 0


# --- weights with companions -----------------------------------------------------------------


@triton.jit
def rest(values, near):
    """The rounding error values - near; 0 for an infinity or NaN."""
    finite = (near.to(tl.uint32, bitcast=True) & _MAGNITUDE) < _INFINITY
    return tl.where(finite, values - near, 0.0)


@triton.jit
def decode_kahan_bf16(codes, companion, root, maps):
    return from_bf16(codes) + from_bf16(companion)


@triton.jit
def encode_kahan_bf16(values, random, root, maps):
    codes = to_bf16(values)
    return codes, to_bf16(rest(values, from_bf16(codes)))


@triton.jit
def decode_kahan_fp16(codes, companion, root, maps):
    return from_fp16(codes) + from_fp16(companion)


@triton.jit
def encode_kahan_fp16(values, random, root, maps):
    codes = to_fp16(values)
    return codes, to_fp16(rest(values, from_fp16(codes)))


@triton.jit
def decode_master_bf16(codes, companion, root, maps):
    """The master weight, unless the weight was changed outside onepass and takes precedence."""
    return tl.where(to_bf16_half_away(companion) == codes, companion, from_bf16(codes))


@triton.jit
def encode_master_bf16(values, random, root, maps):
    return to_bf16_half_away(values), values


@triton.jit
def decode_master_fp16(codes, companion, root, maps):
    """The master weight, unless the weight was changed outside onepass and takes precedence."""
    return tl.where(to_fp16(companion) == codes, companion, from_fp16(codes))


@triton.jit
def encode_master_fp16(values, random, root, maps):
    return to_fp16(values), values


@triton.jit
def joined(codes, low):
    """The fp32 whose bits are codes * 65536 + low.

    A negative low under a zero weight is stale: the weight was set to zero after the step. It is
    treated as 0, because the sum would be a NaN.
    """
    low = tl.where(((codes & 0x7FFF) == 0) & (low < 0), 0, low).to(tl.uint32, bitcast=True)
    return ((codes.to(tl.uint32) << 16) + low).to(tl.float32, bitcast=True)


@triton.jit
def decode_split16(codes, companion, root, maps):
    return joined(codes, companion.to(tl.int16, bitcast=True).to(tl.int32))


@triton.jit
def encode_split16(values, random, root, maps):
    codes = to_bf16_half_away(values)
    low = values.to(tl.uint32, bitcast=True) - (codes.to(tl.uint32) << 16)
    return codes, tl.where(values != values, 0, low).to(tl.uint16)


@triton.jit
def decode_split8(codes, companion, root, maps):
    return joined(codes, companion.to(tl.int8, bitcast=True).to(tl.int32) * 256)


@triton.jit
def encode_split8(values, random, root, maps):
    kept = (values.to(tl.uint32, bitcast=True) + (random & 0xFF)) >> 8
    codes = ((kept + 0x80) >> 8) & 0xFFFF
    low = kept - (codes << 8)
    nan = values != values
    return tl.where(nan, 0x7FC0, codes).to(tl.uint16), tl.where(nan, 0, low).to(tl.uint8)
