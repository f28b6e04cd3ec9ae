"""The formats by their numbers (:mod:`onepass.formats`), in NumPy.

What is stored of a tensor is (data, extra): the codes, and the scales of their blocks or the
companion of a weight, None where a format has none. fp32 rests as fp32, 16-bit floats as uint16.

A state format codes the tuple of an element's moments: second moments first, then the others given
what the second will decode to. kinds says what each slot of a rule is (see onepass.rules.Rule):
"first", a mean with a sign; "second", a mean of squares; "relative", a first moment whose size goes
with the root of the rule's first second moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics.arrays import F32, U32, States
from . import blocks, weights
from .floats import (
    decode_bf16,
    decode_fp16,
    encode_bf16,
    encode_bf16_stochastic,
    encode_fp16,
    encode_fp16_stochastic,
)

Array = npt.NDArray[Any]
Stored = tuple[Array, Array | None]

(FP32, BF16, FP16, BF16_STOCHASTIC, FP16_STOCHASTIC, MX8, MX4, DYNAMIC8) = range(8)
(KAHAN_BF16, KAHAN_FP16, MASTER_BF16, MASTER_FP16, SPLIT16, SPLIT8) = range(8, 14)


# --- states ----------------------------------------------------------------------------------


def _order(kinds: Sequence[str]) -> list[int]:
    """The slots, second moments first."""
    return sorted(range(len(kinds)), key=lambda slot: kinds[slot] != "second")


def _roots(kinds: Sequence[str], decoded: list[F32 | None], slot: int) -> F32 | None:
    """What a relative first moment is divided by in mx4; None where it is stored as it is."""
    if kinds[slot] != "relative":
        return None
    second = decoded[kinds.index("second")]
    assert second is not None
    return np.where(second == 0, np.float32(1), np.sqrt(second))


def _encode_state(
    code: int, values: F32, random: U32, kind: str, slot: int, root: F32 | None
) -> Stored:
    if code == FP32:
        return values, None
    if code == BF16_STOCHASTIC:
        return encode_bf16_stochastic(values, random), None
    if code == MX8:
        if kind == "second":
            return blocks.encode_unsigned(values, random)
        return blocks.encode_signed(values, random, blocks.E4M3)
    if code == MX4:
        if kind == "second":
            codes, scale = blocks.encode_root(np.sqrt(values), random)
        elif root is not None:
            codes, scale = blocks.encode_ratio(blocks.ratio(values, root), random)
        else:
            codes, scale = blocks.encode_signed(values, random, blocks.E2M1)
        return blocks.pack(codes), scale
    if code == DYNAMIC8:
        return blocks.encode_dynamic(values, signed=kind != "second" or slot == 0)
    raise ValueError(f"no state format {code}")


def _decode_state(
    code: int, stored: Stored, count: int, kind: str, slot: int, root: F32 | None
) -> F32:
    data, extra = stored
    if code == FP32:
        return np.array(data, np.float32)
    if code == BF16_STOCHASTIC:
        return decode_bf16(data)
    assert extra is not None
    if code == MX8:
        if kind == "second":
            return blocks.decode_unsigned(data, extra)
        return blocks.decode_signed(data, extra, blocks.E4M3)
    if code == MX4:
        codes = blocks.unpack(data, count)
        if kind == "second":
            value = blocks.decode_root(codes, extra)
            return value * value
        if root is not None:
            return blocks.decode_ratio(codes, extra) * root
        return blocks.decode_signed(codes, extra, blocks.E2M1)
    if code == DYNAMIC8:
        return blocks.decode_dynamic(data, extra, signed=kind != "second" or slot == 0)
    raise ValueError(f"no state format {code}")


def encode_states(
    code: int, states: States, kinds: Sequence[str], random: Sequence[U32 | None]
) -> tuple[Stored | None, ...]:
    """The fp32 states of a rule's slots in a format.

    Args:
        code: the format's number.
        states: fp32 [n] of each slot, None where the rule's flags leave one out.
        kinds: of each slot.
        random: 16 bits an element for each slot, used by stochastic formats.
    """
    stored: list[Stored | None] = [None] * len(states)
    decoded: list[F32 | None] = [None] * len(states)
    for slot in _order(kinds):
        values, bits = states[slot], random[slot]
        if values is None:
            continue
        if bits is None:
            bits = np.zeros(len(values), np.uint32)
        root = _roots(kinds, decoded, slot) if code == MX4 else None
        found = _encode_state(code, values, bits, kinds[slot], slot, root)
        stored[slot] = found
        if code == MX4 and kinds[slot] == "second":
            decoded[slot] = _decode_state(code, found, len(values), kinds[slot], slot, None)
    return tuple(stored)


def decode_states(
    code: int, stored: Sequence[Stored | None], kinds: Sequence[str], count: int
) -> States:
    """What :func:`encode_states` wrote of count elements, as fp32."""
    decoded: list[F32 | None] = [None] * len(stored)
    for slot in _order(kinds):
        found = stored[slot]
        if found is not None:
            root = _roots(kinds, decoded, slot) if code == MX4 else None
            decoded[slot] = _decode_state(code, found, count, kinds[slot], slot, root)
    return tuple(decoded)


# --- weights and gradients -------------------------------------------------------------------


def decode_weight(code: int, data: Array, extra: Array | None = None) -> F32:
    """A weight or gradient as fp32 [n]."""
    if code == FP32:
        return np.array(data, np.float32)
    if code in (BF16, BF16_STOCHASTIC):
        return decode_bf16(data)
    if code in (FP16, FP16_STOCHASTIC):
        return decode_fp16(data)
    assert extra is not None
    if code in (KAHAN_BF16, KAHAN_FP16):
        return weights.decode_kahan(data, extra, code == KAHAN_FP16)
    if code in (MASTER_BF16, MASTER_FP16):
        return weights.decode_master(data, extra, code == MASTER_FP16)
    if code == SPLIT16:
        return weights.decode_split16(data, extra)
    if code == SPLIT8:
        return weights.decode_split8(data, extra)
    raise ValueError(f"no weight format {code}")


def encode_weight(code: int, values: F32, random: U32 | None = None) -> Stored:
    """fp32 [n] as a weight; random holds 16 bits an element for the stochastic formats."""
    plain: dict[int, Any] = {BF16: encode_bf16, FP16: encode_fp16}
    if code == FP32:
        return values, None
    if code in plain:
        return plain[code](values), None
    if code in (KAHAN_BF16, KAHAN_FP16):
        return weights.encode_kahan(values, code == KAHAN_FP16)
    if code in (MASTER_BF16, MASTER_FP16):
        return weights.encode_master(values, code == MASTER_FP16)
    if code == SPLIT16:
        return weights.encode_split16(values)
    assert random is not None
    if code == BF16_STOCHASTIC:
        return encode_bf16_stochastic(values, random), None
    if code == FP16_STOCHASTIC:
        return encode_fp16_stochastic(values, random), None
    if code == SPLIT8:
        return weights.encode_split8(values, random)
    raise ValueError(f"no weight format {code}")
