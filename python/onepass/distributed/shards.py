"""What a rank has of a DTensor: the local tensors of a parameter and of its states.

A plan unwraps a parameter once and works on its local tensor. ``optimizer.state`` holds DTensors of
the parameter's placements: those in its shape, and in formats with blocks the scales and packed
codes where each shard begins a block, as tensors of the shape ``[*shape[:k], blocks or bytes]``,
where ``shape[k:]`` is the fewest dimensions that are whole blocks and none of them is cut.
Otherwise blocks are cut from the beginning of each shard, so that its scales and packed codes say
nothing without it: they are plain local tensors, and are saved as the fp32 values that they stand
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..engine.state_conversion import fit_states, format_of, from_bytes, full_precision, to_bytes
from ..engine.state_layouts import COMPANIONS, STRIDE
from ..engine.tensor_access import dtensor_type, is_dtensor, local_of, unwrapped, version_holder
from ..engine.validation import check_memory
from ..formats import STATE_FORMATS, StateFormat, scale_key
from ..rules import Rule

_ROOM = 256  # elements; a multiple of every format's block


def shards_of(params: Iterable[torch.Tensor]) -> dict[torch.Tensor, Shard]:
    """What this rank has of those that are DTensors."""
    kind = dtensor_type()
    return {} if kind is None else {p: Shard(p) for p in params if isinstance(p, kind)}


def shard_of(param: torch.Tensor) -> Shard | None:
    """What this rank has of a parameter; None of one that is no DTensor."""
    return shards_of([param]).get(param)


class Shard:
    """A rank's part of a parameter.

    Attributes:
        whole: the parameter, a DTensor.
        local: what the rank has of it, maybe nothing.
        groups: process groups over which it is cut; ranks outside them have copies.
        first: where its random bits begin: the index of its first element in the whole parameter,
            in memory order, where it is a stretch of that; else an index beyond, which no other
            shard comes to.

    Raises:
        ValueError: a partial placement, or local tensors of a type of their own.
    """

    def __init__(self, whole: Any) -> None:
        self.whole, self.local = whole, local_of(whole)
        mesh, placements = whole.device_mesh, whole.placements
        if any(p.is_partial() for p in placements):
            raise ValueError(f"a parameter cannot be a partial sum; it has {placements}")
        if type(self.local) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"the local tensor of a parameter is a {type(self.local).__name__}")
        cut = [i for i, p in enumerate(placements) if not p.is_replicate()]
        self._cut = [placements[i].dim for i in cut]
        self.groups = tuple(mesh.get_group(i) for i in cut if mesh.size(i) > 1)
        self.first = self._first(cut)

    def _first(self, cut: list[int]) -> int:
        from torch.distributed.tensor import Shard as Cut
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        whole, local = self.whole, self.local
        mesh, placements = whole.device_mesh, whole.placements
        if not cut or not local.numel():
            return 0
        # Sizes in the order of memory: all but the first above one must be there in full.
        order = sorted(range(whole.dim()), key=lambda d: -whole.stride(d))
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        sizes, of = [local.shape[d] for d in order], [whole.shape[d] for d in order]
        lead = next((i for i, size in enumerate(sizes) if size > 1), len(sizes))
        plain = all(type(placements[i]) is Cut for i in cut) and tuple(shape) == local.shape
        in_order = local.permute(order).is_contiguous()
        if plain and in_order and sizes[lead + 1 :] == of[lead + 1 :]:
            return sum(o * s for o, s in zip(offset, whole.stride(), strict=True))
        index = 0
        for i in cut:
            index = index * mesh.size(i) + mesh.get_local_rank(i)
        return (1 + index) * -(-whole.numel() // _ROOM) * _ROOM

    def start(self, form: StateFormat) -> int:
        """Where its random bits begin in a format: at the beginning of a block."""
        return self.first - self.first % form.block

    def check(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The local tensors of the parameter and of its gradient.

        The gradient's is the parameter's own where the two are placed differently: it is
        redistributed when the step takes it.

        Raises:
            ValueError: the gradient is no DTensor, or of another shape.
        """
        whole = self.whole
        if not is_dtensor(whole.grad):
            raise ValueError(
                f"{which} is a DTensor, but its gradient is a {type(whole.grad).__name__}: "
                "distribute_tensor makes one"
            )
        if whole.grad.shape != whole.shape:
            raise ValueError(f"{which}: its gradient has another shape, {tuple(whole.grad.shape)}")
        placed = whole.grad.placements == whole.placements
        if not placed or whole.grad.device_mesh != whole.device_mesh:
            check_memory(local_of(whole.grad), f"{which}: its gradient")
            return self.local, torch.empty_like(self.local, dtype=whole.grad.dtype)
        return self.local, unwrapped(local_of(whole.grad), which)

    def version_holder(self) -> torch.Tensor:
        """A plain tensor with the version counter of the parameter."""
        return version_holder(self.whole)

    # --- states ---

    def _tail(self, form: StateFormat) -> int | None:
        """The first of the fewest dimensions that are whole blocks, none of them cut; 0 where the
        rank has all; None where there are none."""
        if not self._cut:
            return 0
        if not (self.whole.is_contiguous() and self.local.is_contiguous()):
            return None
        for k in range(self.whole.dim() - 1, max(self._cut), -1):
            if math.prod(self.whole.shape[k:]) % form.block == 0:
                return k
        return None

    def inner(self, state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
        """The local tensors of a state, as those of an ordinary parameter.

        States of other placements are brought to the parameter's, which all ranks must do.
        """
        kind, found = dtensor_type(), {}
        flat = set(map(scale_key, rule.keys))
        for key, value in state.items():
            if isinstance(value, kind) and value.placements != self.whole.placements:
                value = value.redistribute(self.whole.device_mesh, self.whole.placements)
            value = local_of(value)
            if key in COMPANIONS:
                value = from_bytes(value)
            if key in flat and value.dim():
                value = value.reshape(-1)
            found[key] = value
        for key in rule.keys:
            codes, scales = found.get(key), found.get(scale_key(key))
            if codes is not None and scales is not None and scales.dim():
                packed = codes.shape != self.local.shape
                found[key] = codes.reshape(-1) if packed else codes
        return found

    def wrapped(self, held: Mapping[str, Any], rule: Rule, form: StateFormat) -> dict[str, Any]:
        """DTensors around the local tensors of a state, which they share memory with."""
        shape, local = self.whole.shape, self.local.shape
        units = {scale_key(key): form.block for key in rule.keys}
        if form.packed > 1:
            units |= dict.fromkeys(rule.keys, form.packed)
        k, found = self._tail(form), dict(held)
        for key, value in held.items():
            unit, stride = units.get(key), self.whole.stride()
            sizes: Any = shape
            if key == STRIDE or (unit is not None and k is None):
                continue
            if unit is not None:
                assert k is not None
                last = -(-math.prod(shape[k:]) // unit)
                sizes = torch.Size([*shape[:k], last])
                stride = torch.empty(sizes, device="meta").stride()
                value = value.view(*local[:k], last)
            if value.dtype == torch.int16:
                sizes, stride, value = (*shape, 2), (*(2 * s for s in stride), 1), to_bytes(value)
            found[key] = self.like(value, sizes, stride)
        return found

    def like(
        self, local: torch.Tensor, shape: Any = None, stride: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A DTensor of the parameter's placements around a local tensor; None for its shape and
        strides."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        # DTensor.from_local would bring paged states to the device of the mesh.
        meta = TensorMeta(shape or self.whole.shape, stride or self.whole.stride(), local.dtype)
        spec = DTensorSpec(self.whole.device_mesh, self.whole.placements, tensor_meta=meta)
        made: Any = DTensor
        result: torch.Tensor = made(local, spec, requires_grad=False)
        return result

    def saved(self, state: Mapping[str, Any], rule: Rule, which: str) -> dict[str, Any]:
        """A state as it is saved: codes whose blocks are those of their shard alone as the fp32
        values that they stand for, and a scale without dimensions that says so."""
        inner = self.inner(state, rule)
        # Not the format of the group, which may have been given another since.
        forms = [
            format_of(inner[key], inner[scale_key(key)], which)
            for key in rule.keys
            if key in inner and scale_key(key) in inner and inner[scale_key(key)].dim()
        ]
        if not forms or self._tail(forms[0]) is not None:
            return dict(state)
        form, fp32 = forms[0], STATE_FORMATS["fp32"]
        values = fit_states(inner, self.local, rule, fp32, which, copy=True)
        marks = {scale_key(key): torch.zeros((), dtype=form.scale, device="cpu") for key in values}
        rest = {key: value for key, value in state.items() if key != STRIDE}
        return {**rest, **self.wrapped(values, rule, fp32), **marks}


def full_weight(param: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """A weight as the fp32 value that it and the companion in its state stand for; a DTensor of
    one."""
    shard = shard_of(param)
    if shard is None:
        return full_precision(param, state)
    held = {key: from_bytes(local_of(state[key])) for key in COMPANIONS if key in state}
    full = full_precision(shard.local, held)
    return shard.like(full)
