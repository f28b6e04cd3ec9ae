"""Decodes tensors to fp32 values and encodes them, as :mod:`onepass.formats` specifies.

The reference backend and checkpoint conversion use this module. It is exact and slow, and processes
elements in memory order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..formats import (
    StateFormat,
    WeightFormat,
    decode_states,
    decode_weight,
    encode_states,
    encode_weight,
)
from ..numerics.arrays import F32, U32, States

# NumPy has no bfloat16, and the specification uses unsigned codes.
_RAW = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.int16: np.uint16}
_RAW[torch.int8] = np.uint8

NEAREST = np.uint32(0x8080)
"""Replaces the 16 random bits of an element: a stochastic encoder then rounds to nearest, except
that ties may round either way."""


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in memory order, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def to_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy of the stored codes of a dense tensor."""
    values = flat(tensor).cpu().clone()
    raw = _RAW.get(tensor.dtype)
    if raw is None:
        return values.numpy()
    return values.view(torch.int16 if raw is np.uint16 else torch.int8).numpy().view(raw)


def write(tensor: torch.Tensor, codes: npt.NDArray[Any]) -> None:
    """Writes codes into a dense tensor."""
    signed = {2: np.int16, 1: np.uint8 if tensor.dtype == torch.uint8 else np.int8}
    if tensor.dtype in _RAW or tensor.dtype == torch.uint8:
        codes = codes.view(signed[codes.itemsize])
    flat(tensor).copy_(torch.from_numpy(np.ascontiguousarray(codes)).view(tensor.dtype))


def read_states(
    form: StateFormat,
    kinds: Sequence[str],
    states: Mapping[int, torch.Tensor],
    scales: Mapping[int, torch.Tensor],
    count: int,
) -> States:
    """Decodes the state of each slot to fp32 values [count]; None for a slot without a state."""
    stored = tuple(
        (to_array(states[i]), to_array(scales[i]) if i in scales else None) if i in states else None
        for i in range(len(kinds))
    )
    return decode_states(form, stored, kinds, count)


def write_states(
    form: StateFormat,
    kinds: Sequence[str],
    values: States,
    states: Mapping[int, torch.Tensor],
    scales: Mapping[int, torch.Tensor],
    random: Sequence[U32 | None] | None = None,
) -> None:
    """Encodes fp32 values into the tensors of each slot; rounds to nearest if random is None."""
    if random is None:
        random = [None if v is None else np.full(len(v), NEAREST) for v in values]
    for slot, found in enumerate(encode_states(form, values, kinds, random)):
        if found is not None:
            data, extra = found
            write(states[slot], data)
            if extra is not None:
                write(scales[slot], extra)


def read_weight(
    form: WeightFormat, weight: torch.Tensor, companion: torch.Tensor | None = None
) -> F32:
    """Decodes a weight or a gradient to fp32 values."""
    extra = None if companion is None else to_array(companion)
    return decode_weight(form, weight.dtype, to_array(weight), extra)


def write_weight(
    form: WeightFormat,
    values: F32,
    weight: torch.Tensor,
    companion: torch.Tensor | None = None,
    random: U32 | None = None,
) -> None:
    """Encodes fp32 values into a weight and its companion; rounds to nearest if random is None."""
    if random is None:
        random = np.full(len(values), NEAREST)
    data, extra = encode_weight(form, weight.dtype, values, random)
    write(weight, data)
    if companion is not None:
        assert extra is not None
        write(companion, extra)
