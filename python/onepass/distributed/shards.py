"""Shards: the local tensors of a DTensor parameter and its states on one rank.

A plan unwraps a parameter once and works on its local tensor. In ``optimizer.state``, states with
the parameter's shape are DTensors with the parameter's placements. Scales and packed codes depend
on whether shards begin at block boundaries:

- If trailing dimensions ``shape[k:]`` are not sharded and consist of whole blocks, each shard
  begins at a block boundary. Scales and packed codes are then DTensors of shape
  ``[*shape[:k], blocks or bytes]``, with the largest such k.
- Otherwise each rank counts blocks from the beginning of its shard, so scales and packed codes are
  meaningless without that shard. They are plain local tensors, and state dicts contain the decoded
  fp32 values instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..engine.state_conversion import fit_states, format_of, from_bytes, full_precision, to_bytes
from ..engine.state_layouts import COMPANIONS, STRIDE
from ..engine.tensor_access import (
    dtensor_type,
    group_of,
    is_dtensor,
    local_of,
    unwrapped,
    version_holder,
)
from ..engine.validation import check_memory
from ..engine.whole_positions import Place
from ..formats import STATE_FORMATS, StateFormat, scale_key
from ..rules import Rule

_ROOM = 256  # elements; a multiple of every format's block


def shards_of(params: Iterable[torch.Tensor]) -> dict[torch.Tensor, Shard]:
    """The shards of all parameters that are DTensors."""
    kind = dtensor_type()
    return {} if kind is None else {p: Shard(p) for p in params if isinstance(p, kind)}


def shard_of(param: torch.Tensor) -> Shard | None:
    """The shard of a parameter; None if the parameter is not a DTensor."""
    return shards_of([param]).get(param)


class Shard:
    """A rank's shard of a DTensor parameter.

    Attributes:
        whole: the parameter, a DTensor.
        local: the local tensor, which may be empty.
        groups: process groups over which the parameter is sharded; it is replicated over other
            dimensions of the mesh.
        first: the index at which the shard's random bits begin. If the shard is contiguous in the
            whole parameter, this is the index of its first element there, in memory order.
            Otherwise it is an index past the end of the parameter that no other shard uses.

    Raises:
        ValueError: the parameter has a partial placement, it is sharded over a mesh without this
            rank, or its local tensor is a subclass.
    """

    def __init__(self, whole: Any) -> None:
        self.whole, self.local = whole, local_of(whole)
        mesh, placements = whole.device_mesh, whole.placements
        if any(p.is_partial() for p in placements):
            raise ValueError(f"a parameter must not have a Partial placement; got {placements}")
        if type(self.local) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(
                "the local tensor of a parameter must be a torch.Tensor; got a "
                f"{type(self.local).__name__}"
            )
        cut = [i for i, p in enumerate(placements) if not p.is_replicate()]
        self._cut = [placements[i].dim for i in cut]
        self.groups = tuple(group_of(mesh, i) for i in cut if mesh.size(i) > 1)
        self.first = self._first(cut)

    def _first(self, cut: list[int]) -> int:
        """The value of ``first``; cut has the sharded dimensions of the mesh."""
        from torch.distributed.tensor import Shard as Cut
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        whole, local = self.whole, self.local
        mesh, placements = whole.device_mesh, whole.placements
        if not cut or not local.numel():
            return 0
        # In memory order, all dimensions after the shard's first one of size > 1 must be complete.
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
        """``first``, rounded down to the beginning of a block of a format."""
        return self.first - self.first % form.block

    def check(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The local tensors of the parameter and its gradient.

        If the gradient has other placements than the parameter, the second tensor is an
        uninitialised stand-in with the right shape and dtype. The step redistributes the gradient.

        Args:
            which: name of the parameter, for error messages.

        Raises:
            ValueError: the gradient is not a DTensor, or has another shape or no memory.
        """
        whole = self.whole
        if not is_dtensor(whole.grad):
            raise ValueError(
                f"{which} is a DTensor, but its gradient is a {type(whole.grad).__name__}: make it "
                "a DTensor with distribute_tensor()"
            )
        if whole.grad.shape != whole.shape:
            raise ValueError(
                f"{which}: its gradient has another shape than the parameter, "
                f"{tuple(whole.grad.shape)}"
            )
        placed = whole.grad.placements == whole.placements
        if not placed or whole.grad.device_mesh != whole.device_mesh:
            check_memory(local_of(whole.grad), f"{which}: its gradient")
            return self.local, torch.empty_like(self.local, dtype=whole.grad.dtype)
        return self.local, unwrapped(local_of(whole.grad), which)

    def version_holder(self) -> torch.Tensor:
        """A plain tensor that shares the version counter of the parameter."""
        return version_holder(self.whole)

    def place(self) -> Place:
        """The place of the local tensor in the whole parameter.

        Raises:
            ValueError: a placement is neither Shard nor Replicate, or a dimension is sharded twice
                in an order that leaves gaps.
        """
        from torch.distributed.tensor import Shard as Cut
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        whole, mesh = self.whole, self.whole.device_mesh
        if not all(p.is_replicate() or type(p) is Cut for p in whole.placements):
            raise ValueError(
                "track_changes supports the placements Shard and Replicate of a DTensor; got "
                f"{whole.placements}"
            )
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, whole.placements)
        if tuple(shape) != tuple(self.local.shape):
            raise ValueError(
                f"the local tensor of a DTensor has shape {tuple(self.local.shape)}; its "
                f"placements need {tuple(shape)}"
            )
        at = mesh.get_coordinate() or [1] * mesh.ndim  # a rank outside of the mesh owns nothing
        copies = [i for i, p in zip(at, whole.placements, strict=True) if p.is_replicate()]
        return Place(
            tuple(whole.shape),
            tuple(self.local.shape),
            self.local.stride(),
            tuple(offset),
            owned=not any(copies) and mesh.get_coordinate() is not None,
        )

    # --- states ---

    def _tail(self, form: StateFormat) -> int | None:
        """The largest k for which dimensions k and up are unsharded and consist of whole blocks.

        Returns:
            0 if the parameter is not sharded; None if there is no such k.
        """
        if not self._cut:
            return 0
        if not (self.whole.is_contiguous() and self.local.is_contiguous()):
            return None
        for k in range(self.whole.dim() - 1, max(self._cut), -1):
            if math.prod(self.whole.shape[k:]) % form.block == 0:
                return k
        return None

    def inner(self, state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
        """Unwraps a state to the local tensors that an ordinary parameter would have.

        A state with other placements is redistributed to the parameter's placements, which is a
        collective call.

        Args:
            state: the parameter's entry in ``optimizer.state`` or in a state dict.
            rule: the rule of the optimizer.
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
        """Wraps the local tensors of a state in DTensors that share their memory."""
        shape, local = self.whole.shape, self.local.shape
        units = {scale_key(key): form.block for key in rule.keys}
        packed = {key: rule.format_of(key, form).packed for key in rule.keys}
        units |= {key: count for key, count in packed.items() if count > 1}
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
        """Wraps a local tensor in a DTensor with the parameter's placements.

        Args:
            local: the local tensor.
            shape, stride: global shape and strides of the DTensor; None for the parameter's.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        # DTensor.from_local would copy paged states from the host to the device of the mesh.
        meta = TensorMeta(shape or self.whole.shape, stride or self.whole.stride(), local.dtype)
        spec = DTensorSpec(self.whole.device_mesh, self.whole.placements, tensor_meta=meta)
        made: Any = DTensor
        result: torch.Tensor = made(local, spec, requires_grad=False)
        return result

    def saved(self, state: Mapping[str, Any], rule: Rule, which: str) -> dict[str, Any]:
        """The entry of a state dict for this parameter.

        Codes whose blocks are counted from the beginning of the shard are replaced by their decoded
        fp32 values; a 0-dim scale marks the replacement.

        Args:
            state: the parameter's entry in ``optimizer.state``.
            rule: the rule of the optimizer.
            which: name of the parameter, for error messages.
        """
        inner = self.inner(state, rule)
        # Read the format from the tensors, because the group's option may have changed since.
        forms = [
            format_of(inner[key], inner[scale_key(key)], which)
            for key in rule.keys
            if key in inner and scale_key(key) in inner and inner[scale_key(key)].dim()
        ]
        if not forms or self._tail(forms[0]) is not None:
            return dict(state)
        form, fp32 = forms[0], STATE_FORMATS["fp32"]
        values = fit_states(inner, self.local, rule, fp32, which, copy=True)
        scaled = [scale_key(key) for key in values if scale_key(key) in inner]
        marks = {key: torch.zeros((), dtype=form.scale, device="cpu") for key in scaled}
        rest = {key: value for key, value in state.items() if key != STRIDE}
        return {**rest, **self.wrapped(values, rule, fp32), **marks}


def full_weight(param: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """The fp32 value that a weight and the companion in its state represent together.

    Args:
        param: the weight.
        state: the weight's entry in ``optimizer.state``.

    Returns:
        A DTensor if the weight is a DTensor, else a plain tensor.
    """
    shard = shard_of(param)
    if shard is None:
        return full_precision(param, state)
    held = {key: from_bytes(local_of(state[key])) for key in COMPANIONS if key in state}
    full = full_precision(shard.local, held)
    return shard.like(full)
