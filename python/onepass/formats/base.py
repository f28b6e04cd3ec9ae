"""The definition of a format: the storage of a tensor, and the functions that encode and decode it.

A stored tensor is a pair (data, extra). data holds the codes. extra holds the block scales of a
state or the companion of a weight (the tensor that stores the bits the weight lacks); extra is None
if the format has neither. In NumPy, fp32 is stored as float32, a 16-bit float as uint16, and a code
or companion of 8 or 16 bits as an unsigned integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..numerics.arrays import F32, U32, States
from ..numerics.random_bits import SHARED_WEIGHT_BITS, WEIGHT_BITS

Array = npt.NDArray[Any]
Stored = tuple[Array, Array | None]


class Moment(NamedTuple):
    """The role of a state in its rule; a format selects the encoding by this role.

    Attributes:
        kind: "first", a signed mean; "second", a mean of squares; "relative", a first moment whose
            magnitude scales with the square root of the rule's first state of kind "second";
            "weight", a second weight, which some formats store in another one
            (:meth:`StateFormat.of`).
        slot: the position of the state among the states of the rule.
        root: fp32 [n], the square root of the decoded second moment, with 1 in place of 0. Set only
            for a relative moment in a format with ``needs_root``; else None.
    """

    kind: str
    slot: int
    root: F32 | None = None


@dataclass(frozen=True)
class StateFormat:
    """A format of optimizer states.

    Attributes:
        name: the value of the ``states`` option.
        code: the number of the format in compiled libraries (csrc/formats/table.h).
        dtype: the dtype of the code tensor, which has the shape and strides of the parameter unless
            codes are packed. No two formats have the same pair of code dtype and scale dtype.
        encode: (fp32 values [n], random bits, moment) -> stored. The random bits are uint32 [n]; in
            each element the lower 16 bits are random and the upper 16 bits are 0.
        decode: (data, scales, n, moment) -> fp32 values [n].
        stochastic: whether encode reads the random bits.
        block: the number of consecutive elements in memory that share a scale; 1 without scales.
        scale: the dtype of the scales, which have shape [ceil(numel / block)]; None without scales.
        packed: the number of codes per byte. The code tensor has shape [ceil(numel / packed)] if
            this is more than 1.
        needs_root: whether relative first moments are encoded as ratios to the square root of the
            second moment. ``Moment.root`` is then computed from the decoded second moment.
        for_weights: the format that stores states of kind "weight" instead of this one; None for
            this one. Formats with blocks name fp32: an update is much smaller than the spacing of
            8-bit codes near the largest weight of a block.
        readable_since: the lowest ``format_version`` of checkpoints that this version can decode.
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
    for_weights: StateFormat | None = None
    readable_since: int = 1

    def of(self, kind: str) -> StateFormat:
        """The format of a state of a kind if the option ``states`` selects this format."""
        return self.for_weights or self if kind == "weight" else self

    @property
    def bytes(self) -> float:
        """Bytes per stored value in a long tensor, including its share of the block scale."""
        scale = self.scale.itemsize / self.block if self.scale else 0.0
        return self.dtype.itemsize / self.packed + scale


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights: how a 16-bit weight keeps its precision.

    Attributes:
        name: the value of the ``weights`` option.
        codes: the number of the format in compiled libraries, for each supported weight dtype.
        encode: (fp32 values [n], random bits, dtype of the weight) -> stored. The random bits are
            as in :class:`StateFormat`.
        decode: (weight, companion, dtype of the weight) -> fp32 values [n].
        key: the key of the companion tensor in the parameter's state; empty without a companion.
            The companion has the shape and strides of the parameter.
        companion: the dtype of the companion; None for the dtype of the weight.
        stochastic: whether encode reads the random bits.
        random_position: the position of the 16 random bits that encode reads (see
            :func:`onepass.numerics.random_bits.bits_from`), if it does not depend on the states.
        starts_as_weight: whether a new companion is a copy of the weight instead of 0.
    """

    name: str
    codes: dict[torch.dtype, int] = field(hash=False)
    encode: Callable[[F32, U32, torch.dtype], Stored] = field(repr=False)
    decode: Callable[[Array, Any, torch.dtype], F32] = field(repr=False)
    key: str = ""
    companion: torch.dtype | None = None
    stochastic: bool = False
    random_position: int | None = None
    starts_as_weight: bool = False

    @property
    def saved_as_bytes(self) -> bool:
        """Whether state dicts store the companion as uint8 [*shape, 2].

        This holds for int16 companions, because process groups cannot send int16.
        """
        return self.companion == torch.int16

    def position_of_bits(self, states_draw: bool) -> int:
        """The position of the random bits that encode reads.

        Args:
            states_draw: whether a state of the parameter draws random bits.
        """
        if self.random_position is not None:
            return self.random_position
        return SHARED_WEIGHT_BITS if states_draw else WEIGHT_BITS

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the companion per weight."""
        return (self.companion or dtype).itemsize if self.key else 0


def encode_states(
    form: StateFormat, states: States, kinds: Sequence[str], random: Sequence[U32 | None]
) -> tuple[Stored | None, ...]:
    """Encode the fp32 states of one parameter.

    Args:
        form: the format.
        states: fp32 [n] for each slot of the rule; None for a slot that the flags leave out.
        kinds: the kind of each slot.
        random: for each slot, 16 random bits per element; None stands for zeros.
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
        data, scales = form.of(moment.kind).encode(values, bits, moment)
        stored[slot] = data, scales
        if form.needs_root and moment.kind == "second":
            decoded[slot] = form.decode(data, scales, len(values), moment)
    return tuple(stored)


def decode_states(
    form: StateFormat, stored: Sequence[Stored | None], kinds: Sequence[str], count: int
) -> States:
    """Decode the result of :func:`encode_states` for ``count`` elements."""
    decoded: list[F32 | None] = [None] * len(stored)
    for slot in _second_moments_first(kinds):
        found = stored[slot]
        if found is not None:
            moment = _moment(form, kinds, slot, decoded)
            decoded[slot] = form.of(moment.kind).decode(*found, count, moment)
    return tuple(decoded)


def encode_weight(
    form: WeightFormat, dtype: torch.dtype, values: F32, random: U32 | None = None
) -> Stored:
    """Encode fp32 values as a weight of a dtype.

    Args:
        form: the format.
        dtype: the dtype of the weight; one of ``form.codes``.
        values: fp32 [n].
        random: 16 random bits per element; None stands for zeros.
    """
    bits = np.zeros(len(values), np.uint32) if random is None else random
    return form.encode(values, bits, dtype)


def decode_weight(
    form: WeightFormat, dtype: torch.dtype, data: Array, companion: Array | None = None
) -> F32:
    """Decode a stored weight or gradient of a dtype to fp32 [n]."""
    return form.decode(data, companion, dtype)


def _second_moments_first(kinds: Sequence[str]) -> list[int]:
    """The slots in encoding order: second moments first, since relative moments need their root."""
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
