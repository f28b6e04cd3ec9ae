"""What a format is: how a tensor is stored, and the functions that encode and decode it.

A stored tensor is a pair (data, extra). data holds the codes; extra holds the scales of their
blocks or the companion of a weight, and is None for a format that has neither. In NumPy, fp32 is
stored as float32, a 16-bit float as uint16, and a code or companion of 8 or 16 bits as an unsigned
integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..numerics.arrays import F32, U32, States

Array = npt.NDArray[Any]
Stored = tuple[Array, Array | None]


class Moment(NamedTuple):
    """What a state means to its rule; formats choose the code by it.

    Attributes:
        kind: "first", a mean with a sign; "second", a mean of squares; "relative", a first moment
            whose size follows the root of the rule's first second moment.
        slot: its position among the states of the rule.
        root: fp32 [n], the square root of that second moment as it decodes, 1 where it is 0; given
            for a relative moment if the format has ``needs_root``, else None.
    """

    kind: str
    slot: int
    root: F32 | None = None


@dataclass(frozen=True)
class StateFormat:
    """A format of optimizer states.

    Attributes:
        name: what users ask for.
        code: its number in compiled libraries (csrc/formats/table.h).
        dtype: of the tensor of codes, which has the parameter's shape and strides unless codes are
            packed. No two formats have the same dtypes of codes and of scales.
        encode: (fp32 values [n], random bits, moment) -> stored. The random bits are uint32 [n],
            of which the lower 16 are random and the upper 16 are 0.
        decode: (data, scales, n, moment) -> fp32 values [n].
        stochastic: whether encode reads the random bits.
        block: number of elements, in memory order, that share a scale; 1 for none.
        scale: dtype of the scales, a tensor [ceil(numel / block)] beside the codes.
        packed: codes in one byte; with more than one the codes are [ceil(numel / packed)].
        needs_root: whether relative first moments are coded as ratios to the root of the second
            moment. encode then gets the root of what the second moment decodes to.
        readable_since: the least ``format_version`` of a checkpoint whose codes mean what they
            mean now.
    """

    name: str
    code: int
    dtype: torch.dtype
    encode: Callable[[F32, U32, Moment], Stored] = field(repr=False)
    decode: Callable[[Array, Any, int, Moment], F32] = field(repr=False)
    stochastic: bool = False
    block: int = 1
    scale: torch.dtype | None = None
    packed: int = 1
    needs_root: bool = False
    readable_since: int = 1

    @property
    def bytes(self) -> float:
        """Bytes of a stored value, its share of a scale included, in a long tensor."""
        scale = self.scale.itemsize / self.block if self.scale else 0.0
        return self.dtype.itemsize / self.packed + scale


@dataclass(frozen=True)
class WeightFormat:
    """How a weight of 16 bits keeps its precision.

    Attributes:
        name: what users ask for.
        codes: its number in compiled libraries, for each dtype of a weight that it serves.
        encode: (fp32 values [n], random bits, dtype of the weight) -> stored. The random bits are
            as in :class:`StateFormat`.
        decode: (weight, companion, dtype of the weight) -> fp32 values [n].
        key: of the companion tensor in the parameter's state, of the parameter's shape and strides;
            empty for none.
        companion: dtype of it, None for the weight's own.
        stochastic: whether encode reads the random bits.
        random_half: which of an element's random bits encode reads: 0 and 1 are the lower and the
            upper 16 bits of word 0, 2 and 3 those of word 1. The state in slot i reads half i.
        starts_as_weight: whether a new companion is a copy of the weight; else it is 0.
    """

    name: str
    codes: dict[torch.dtype, int] = field(hash=False)
    encode: Callable[[F32, U32, torch.dtype], Stored] = field(repr=False)
    decode: Callable[[Array, Any, torch.dtype], F32] = field(repr=False)
    key: str = ""
    companion: torch.dtype | None = None
    stochastic: bool = False
    random_half: int = 3
    starts_as_weight: bool = False

    @property
    def saved_as_bytes(self) -> bool:
        """Whether state dicts hold the companion as uint8 [*shape, 2]: process groups do not send
        int16."""
        return self.companion == torch.int16

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the companion of one weight."""
        return (self.companion or dtype).itemsize if self.key else 0


def encode_states(
    form: StateFormat, states: States, kinds: Sequence[str], random: Sequence[U32 | None]
) -> tuple[Stored | None, ...]:
    """Encode the fp32 states of one parameter.

    Args:
        form: the format.
        states: fp32 [n] of each slot of the rule, None where the rule's flags leave one out.
        kinds: the kind of each slot.
        random: 16 random bits an element for each slot; None stands for zeros.
    """
    stored: list[Stored | None] = [None] * len(states)
    decoded: list[F32 | None] = [None] * len(states)
    for slot in _second_moments_first(kinds):
        values, bits = states[slot], random[slot]
        if values is None:
            continue
        if bits is None:
            bits = np.zeros(len(values), np.uint32)
        moment = _moment(form, kinds, slot, decoded)
        data, scales = form.encode(values, bits, moment)
        stored[slot] = data, scales
        if form.needs_root and moment.kind == "second":
            decoded[slot] = form.decode(data, scales, len(values), moment)
    return tuple(stored)


def decode_states(
    form: StateFormat, stored: Sequence[Stored | None], kinds: Sequence[str], count: int
) -> States:
    """Decode what :func:`encode_states` returned for ``count`` elements."""
    decoded: list[F32 | None] = [None] * len(stored)
    for slot in _second_moments_first(kinds):
        found = stored[slot]
        if found is not None:
            moment = _moment(form, kinds, slot, decoded)
            decoded[slot] = form.decode(*found, count, moment)
    return tuple(decoded)


def encode_weight(
    form: WeightFormat, dtype: torch.dtype, values: F32, random: U32 | None = None
) -> Stored:
    """Encode fp32 values as a weight of a dtype.

    Args:
        form: the format.
        dtype: of the weight; one of ``form.codes``.
        values: fp32 [n].
        random: 16 random bits an element; None stands for zeros.
    """
    bits = np.zeros(len(values), np.uint32) if random is None else random
    return form.encode(values, bits, dtype)


def decode_weight(
    form: WeightFormat, dtype: torch.dtype, data: Array, companion: Array | None = None
) -> F32:
    """Decode a stored weight or gradient of a dtype to fp32 [n]."""
    return form.decode(data, companion, dtype)


def _second_moments_first(kinds: Sequence[str]) -> list[int]:
    """The slots in the order in which they are coded: a root needs its second moment."""
    return sorted(range(len(kinds)), key=lambda slot: kinds[slot] != "second")


def _moment(
    form: StateFormat, kinds: Sequence[str], slot: int, decoded: Sequence[F32 | None]
) -> Moment:
    """The moment in a slot, given the second moments decoded so far."""
    if not form.needs_root or kinds[slot] != "relative":
        return Moment(kinds[slot], slot)
    second = decoded[kinds.index("second")]
    assert second is not None
    return Moment(kinds[slot], slot, np.where(second == 0, np.float32(1), np.sqrt(second)))
