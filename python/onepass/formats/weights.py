"""How a 16-bit weight keeps its precision, in NumPy: the weight and a companion beside it.

kahan: a second number of the weight's type that holds what rounding left over. master: an fp32
copy. split: the bits of the fp32 value that the bfloat16 does not have, 16 or 8 of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.arrays import F32, U8, U16, U32
from .floats import BF16_NAN, decode_bf16, decode_fp16, encode_bf16, encode_fp16


def encode_kahan(values: F32, half: bool) -> tuple[U16, U16]:
    """(weight, compensation), both bfloat16 (half: binary16), each to nearest; their sum is the
    value. The compensation of an infinity or NaN is 0."""
    encode, decode = (encode_fp16, decode_fp16) if half else (encode_bf16, decode_bf16)
    weight = encode(values)
    near = decode(weight)
    with np.errstate(invalid="ignore"):  # infinity less itself
        rest = np.where(np.isfinite(near), values - near, np.float32(0))
    return weight, encode(rest)


def decode_kahan(weight: U16, compensation: U16, half: bool) -> F32:
    """The sum, in fp32."""
    decode = decode_fp16 if half else decode_bf16
    return decode(weight) + decode(compensation)


def round_half_away(values: F32) -> U16:
    """fp32 to bfloat16, to nearest, ties away from zero.

    Ties to even would give two values that are a tie apart the same weight and the same 16 bits
    below it, and a split could not be exact. NaN becomes 0x7FC0.
    """
    rounded = (values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
    return np.where(np.isnan(values), BF16_NAN, rounded.astype(np.uint16))


def encode_master(values: F32, half: bool) -> tuple[U16, F32]:
    """(weight, the value): binary16 to nearest even, bfloat16 as :func:`round_half_away`."""
    return (encode_fp16(values) if half else round_half_away(values)), values


def decode_master(weight: U16, master: F32, half: bool) -> F32:
    """The master; the weight itself where it is no longer the rounded master, as after loading
    other weights into the model."""
    kept = encode_master(master, half)[0] == weight
    return np.where(kept, master, decode_fp16(weight) if half else decode_bf16(weight))


def encode_split16(values: F32) -> tuple[U16, U16]:
    """(weight, low): the value's bits are those of the weight, 65536 times, plus low as a signed
    integer. Exact but for the payload of a NaN."""
    weight = round_half_away(values)
    low = values.view(np.uint32) - (weight.astype(np.uint32) << np.uint32(16))
    return weight, np.where(np.isnan(values), np.uint16(0), low.astype(np.uint16))


def _joined(weight: U16, low: npt.NDArray[np.int32]) -> F32:
    """The value whose bits are those of the weight, 65536 times, plus low.

    Less than nothing below a weight of zero, which no value gives, is left of a weight that was
    set to zero since: it counts as nothing. The sum would be a NaN.
    """
    below = np.where(weight & np.uint16(0x7FFF) == 0, np.maximum(low, 0), low)
    bits = (weight.astype(np.uint32) << np.uint32(16)) + below.astype(np.uint32)
    return bits.view(np.float32)


def decode_split16(weight: U16, low: U16) -> F32:
    """What :func:`encode_split16` wrote."""
    return _joined(weight, low.view(np.int16).astype(np.int32))


def encode_split8(values: F32, random: U32) -> tuple[U16, U8]:
    """(weight, low): the upper 24 bits of the value, the lowest of them rounded stochastically by
    the lower 8 of 16 random bits; low is a signed integer, as in :func:`encode_split16`."""
    bits = values.view(np.uint32)
    kept = (bits + (random & np.uint32(0xFF))) >> np.uint32(8)
    weight = ((kept + np.uint32(0x80)) >> np.uint32(8)).astype(np.uint16)
    low = (kept - (weight.astype(np.uint32) << np.uint32(8))).astype(np.uint8)
    nan = np.isnan(values)
    return np.where(nan, BF16_NAN, weight), np.where(nan, np.uint8(0), low)


def decode_split8(weight: U16, low: U8) -> F32:
    """What :func:`encode_split8` wrote."""
    return _joined(weight, low.view(np.int8).astype(np.int32) * np.int32(256))
