"""The formats in Triton and the counter-based random bits, as :mod:`onepass.reference` has them.

A format decodes stored elements to fp32 blocks and encodes fp32 blocks; 16-bit floats rest as
unsigned codes, so that rounding is integer arithmetic that the interpreter and every GPU agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

# --- random bits -----------------------------------------------------------------------------


@triton.jit
def splitmix64(z):
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_stream(seed, step, param_id):
    """The stream key of one parameter at one step; int64 scalars, as the tables hold them."""
    z = splitmix64(seed.to(tl.uint64)) ^ step.to(tl.uint64)
    return splitmix64(splitmix64(z) ^ param_id.to(tl.uint64))


@triton.jit
def random_bits(stream, index, offsets, WORD: tl.constexpr):
    """32 bits for each element index + offsets, none of which may cross a multiple of 2^32."""
    index = index.to(tl.uint64)
    key = splitmix64(stream ^ ((index >> 32) | (WORD << 32)))
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    x = (index.to(tl.uint32) + offsets.to(tl.uint32)) * 0x9E3779B9 + k0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15) ^ k1) * 0x846CA68B


# --- formats ---------------------------------------------------------------------------------


@triton.jit
def decode_fp32(values):
    return values


@triton.jit
def encode_fp32(values, random):
    return values


@triton.jit
def decode_bf16(codes):
    return (codes.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def encode_bf16(values, random):
    bits = values.to(tl.uint32, bitcast=True)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return tl.where(values != values, 0x7FC0, rounded >> 16).to(tl.uint16)


@triton.jit
def encode_bf16_stochastic(values, random):
    rounded = values.to(tl.uint32, bitcast=True) + random
    return tl.where(values != values, 0x7FC0, rounded >> 16).to(tl.uint16)


@triton.jit
def decode_fp16(codes):
    return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def encode_fp16(values, random):
    return values.to(tl.float16).to(tl.uint16, bitcast=True)


@dataclass(frozen=True)
class Format:
    """A format as the sweep takes it, a constexpr.

    Attributes:
        name: for error messages and the names of compiled kernels.
        element: Triton's type of a stored element.
        decode: (stored block) -> fp32 block.
        encode: (fp32 block, random) -> stored block; random has 16 bits an element if stochastic.
        stochastic: whether encode draws random bits.
    """

    name: str
    element: tl.dtype
    decode: Any
    encode: Any
    stochastic: bool = False


# By the code of onepass/formats.py.
FORMATS = {
    0: Format("fp32", tl.float32, decode_fp32, encode_fp32),
    1: Format("bf16", tl.uint16, decode_bf16, encode_bf16),
    2: Format("fp16", tl.uint16, decode_fp16, encode_fp16),
    3: Format("bf16sr", tl.uint16, decode_bf16, encode_bf16_stochastic, stochastic=True),
}
