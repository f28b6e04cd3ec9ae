"""The floats of weights, gradients and bf16 states, in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U16, U32
from .base import Array

BF16_NAN = np.uint16(0x7FC0)


def decode_bf16(codes: U16) -> F32:
    """bfloat16 codes to fp32: exact."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_bf16(values: F32) -> U16:
    """fp32 to bfloat16, to nearest, ties to even. NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def encode_bf16_stochastic(values: F32, random: U32) -> U16:
    """fp32 to bfloat16, away from zero with the probability of the 16 bits dropped.

    random holds 16 bits an element. The mean of many draws is the value itself, at zero and at
    denormals too; a value that bfloat16 holds stays; NaN becomes 0x7FC0.
    """
    rounded = values.view(np.uint32) + random
    return np.where(np.isnan(values), BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def round_half_away(values: F32) -> U16:
    """fp32 to bfloat16, to nearest, ties away from zero. NaN becomes 0x7FC0.

    A split weight needs it: ties to even would give two values that are a tie apart the same weight
    and the same 16 bits below it.
    """
    rounded = (values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
    return np.where(np.isnan(values), BF16_NAN, rounded.astype(np.uint16))


def decode_fp16(codes: U16) -> F32:
    """IEEE binary16 codes to fp32: exact."""
    return codes.view(np.float16).astype(np.float32)


def encode_fp16(values: F32) -> U16:
    """fp32 to IEEE binary16, to nearest, ties to even; from 65520 on infinity."""
    return values.astype(np.float16).view(np.uint16)


def encode_fp16_stochastic(values: F32, random: U32) -> U16:
    """fp32 to IEEE binary16, away from zero with the probability of the bits dropped.

    random holds 16 bits an element, of which the upper 13 are used. Below 2^-14 the value is first
    rounded to a multiple of 2^-37, where fp32 has its spacing beside 2^-14. What rounds beyond
    65504 is infinity; NaN becomes 0x7E00.
    """
    bits = values.view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    small = magnitude < np.uint32(0x38800000)
    shifted = (magnitude.view(np.float32) + np.float32(2**-14)).view(np.uint32)
    base = np.where(small, np.uint32(113 << 23), np.uint32(112 << 23))
    code = (np.where(small, shifted, magnitude) - base + (random >> np.uint32(3))) >> np.uint32(13)
    code = np.where(magnitude >= np.uint32(0x47800000), np.uint32(0x7C00), code)
    code = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7E00), code)
    return (sign | code).astype(np.uint16)


_CODECS = {torch.bfloat16: (decode_bf16, encode_bf16), torch.float16: (decode_fp16, encode_fp16)}


def decode_float(codes: Array, dtype: torch.dtype) -> F32:
    """A float32, bfloat16 or float16 tensor as stored, to fp32: exact, and a copy."""
    return np.array(codes, np.float32) if dtype == torch.float32 else _CODECS[dtype][0](codes)


def encode_float(values: F32, dtype: torch.dtype) -> Array:
    """fp32 to float32, bfloat16 or float16, to nearest, ties to even."""
    return values if dtype == torch.float32 else _CODECS[dtype][1](values)
