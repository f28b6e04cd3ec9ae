"""Conversions between fp32 and the 16-bit floats of weights, gradients and states, in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from ..numerics.arrays import F32, U16, U32
from .base import Array

BF16_NAN = np.uint16(0x7FC0)


def decode_bf16(codes: U16) -> F32:
    """Convert bfloat16 codes to fp32; exact."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_bf16(values: F32) -> U16:
    """Round fp32 to the nearest bfloat16, ties to even. NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def encode_bf16_stochastic(values: F32, random: U32) -> U16:
    """Round fp32 to bfloat16 stochastically.

    A value is rounded away from zero with probability (its 16 dropped bits) / 2^16. The rounding is
    unbiased, also for denormals. A value that bfloat16 represents exactly is unchanged. NaN becomes
    0x7FC0.

    Args:
        values: fp32 [n].
        random: uint32 [n], 16 random bits per element.
    """
    rounded = values.view(np.uint32) + random
    return np.where(np.isnan(values), BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def round_half_away(values: F32) -> U16:
    """Round fp32 to the nearest bfloat16, ties away from zero. NaN becomes 0x7FC0.

    Split weights need this rounding. With ties to even, the ties half a spacing below and above the
    same weight would have the same weight and the same 16 lower bits.
    """
    rounded = (values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
    return np.where(np.isnan(values), BF16_NAN, rounded.astype(np.uint16))


def decode_fp16(codes: U16) -> F32:
    """Convert IEEE binary16 codes to fp32; exact."""
    return codes.view(np.float16).astype(np.float32)


def encode_fp16(values: F32) -> U16:
    """Round fp32 to the nearest IEEE binary16, ties to even; 65520 and above become infinity."""
    return values.astype(np.float16).view(np.uint16)


def encode_fp16_stochastic(values: F32, random: U32) -> U16:
    """Round fp32 to IEEE binary16 stochastically.

    A value is rounded away from zero with probability (its 13 dropped bits) / 2^13. A value below
    2^-14 is first rounded to a multiple of 2^-37, the spacing of fp32 just above 2^-14. A result
    above 65504 becomes infinity; NaN becomes 0x7E00.

    Args:
        values: fp32 [n].
        random: uint32 [n], 16 random bits per element; the upper 13 of the 16 are used.
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
    """Convert a stored float32, bfloat16 or float16 tensor to a new fp32 array; exact."""
    return np.array(codes, np.float32) if dtype == torch.float32 else _CODECS[dtype][0](codes)


def encode_float(values: F32, dtype: torch.dtype) -> Array:
    """Round fp32 to the nearest float32, bfloat16 or float16, ties to even."""
    return values if dtype == torch.float32 else _CODECS[dtype][1](values)
