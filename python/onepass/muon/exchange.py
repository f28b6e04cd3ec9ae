"""Directions of DTensors: each matrix is orthogonalised once, by one rank.

Each rank has a shard of each direction. One all-to-all brings the shards of a matrix together on
the rank that orthogonalises it, and a second one brings the result back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .batches import Direction, Directions, Settings
from .matrices import Matrices


class Sharding(NamedTuple):
    """How the DTensors of a part are sharded.

    Attributes:
        group: the process group; the shards of rank i are the i-th along the dimension.
        dims: the sharded dimension of each parameter.
        shapes: the shape of each whole parameter.
    """

    group: Any
    dims: list[int]
    shapes: list[tuple[int, ...]]


def sharding_of(owners: Sequence[Any], names: Sequence[str]) -> Sharding | None:
    """The sharding of DTensors over one process group; None if every rank has all of them.

    Args:
        owners: the DTensors of one part of a plan.
        names: their names, for error messages.

    Raises:
        ValueError: a DTensor is sharded over several dimensions of its mesh, or not evenly in the
            order of ranks; or its local tensor is not contiguous.
    """
    from torch.distributed.tensor import Shard

    group, dims = None, []
    for owner, which in zip(owners, names, strict=True):
        mesh = owner.device_mesh
        cut = [
            i
            for i, place in enumerate(owner.placements)
            if not place.is_replicate() and mesh.size(i) > 1
        ]
        if not cut:
            continue
        place = owner.placements[cut[0]]
        if len(cut) > 1 or type(place) is not Shard:
            raise ValueError(
                f"{which} has the placements {owner.placements}; Muon supports DTensors that are "
                "sharded over one dimension of their mesh"
            )
        if not owner.to_local().is_contiguous() or not owner.is_contiguous():
            raise ValueError(f"{which} must be contiguous, because it is a DTensor of Muon")
        group = mesh.get_group(cut[0])
        dims.append(place.dim % owner.dim())
    if group is None:
        return None
    return Sharding(group, dims, [tuple(owner.shape) for owner in owners])


def shard_sizes(size: int, ranks: int) -> list[int]:
    """The lengths of the shards of a dimension, as torch.chunk and DTensor divide it."""
    most = -(-size // ranks)
    return [max(0, min(most, size - most * rank)) for rank in range(ranks)]


def owners_of(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each parameter: the most expensive first, each to the rank with the least work.

    The result depends only on the arguments, so it is the same on every rank.
    """
    loads, chosen = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[i] = min(range(ranks), key=lambda rank: loads[rank])
        loads[chosen[i]] += costs[i]
    return chosen


def cost_of(matrices: Matrices) -> int:
    """The multiplications of one iteration, up to a factor."""
    m = min(matrices.rows, matrices.cols)
    return matrices.count * m * m * (2 * max(matrices.rows, matrices.cols) + m)


class _Piece(NamedTuple):
    """A shard of a whole direction that this rank orthogonalises, and its place when received."""

    whole: torch.Tensor
    received: torch.Tensor


class SharedDirections:
    """The directions of DTensors; see :class:`onepass.muon.batches.Directions`.

    All ranks of the process group must have gradients of the same parameters.

    Args:
        found: the whole directions, contiguous, in the order of entries; equal on all ranks.
        sharding: how they are sharded.
        settings: the options of the products.
        device: the device of the memory.

    Attributes:
        tensors: this rank's shard of each direction.
        memory: all memory.
    """

    def __init__(
        self,
        found: Sequence[Direction],
        sharding: Sharding,
        settings: Settings,
        device: torch.device,
    ) -> None:
        from torch.distributed import get_rank, get_world_size

        self._group = sharding.group
        ranks, me = get_world_size(self._group), get_rank(self._group)
        shapes = [
            [(*shape[:dim], size, *shape[dim + 1 :]) for size in shard_sizes(shape[dim], ranks)]
            for shape, dim in zip(sharding.shapes, sharding.dims, strict=True)
        ]
        owner = owners_of([cost_of(one.matrices) for one in found], ranks)
        mine = [i for i in range(len(found)) if owner[i] == me]
        self._whole = Directions([found[i] for i in mine], settings, device)
        # This rank's shards in the order of their owners: the buffer that is sent.
        order = sorted(range(len(found)), key=lambda i: owner[i])
        self._sent = [0] * ranks
        offsets, length = [0] * len(found), 0
        for i in order:
            numel = math.prod(shapes[i][me])
            offsets[i], length = length, length + numel
            self._sent[owner[i]] += numel
        dtype = settings.dtype(device)
        self._shards = torch.zeros(length, dtype=dtype, device=device)
        self.tensors = [
            self._shards[offset : offset + math.prod(shape[me])].view(shape[me])
            for offset, shape in zip(offsets, shapes, strict=True)
        ]
        self._received = [sum(math.prod(shapes[i][r]) for i in mine) for r in range(ranks)]
        self._gathered = torch.zeros(sum(self._received), dtype=dtype, device=device)
        self._pieces: list[_Piece] = []
        at, starts = 0, [0] * len(mine)
        for rank in range(ranks):
            for k, i in enumerate(mine):
                shape, dim = shapes[i][rank], sharding.dims[i]
                numel = math.prod(shape)
                whole = self._whole.tensors[k].narrow(dim, starts[k], shape[dim])
                self._pieces.append(_Piece(whole, self._gathered[at : at + numel].view(shape)))
                at += numel
                starts[k] += shape[dim]
        self.memory = [*self._whole.memory, self._shards, self._gathered]

    def orthogonalize(self) -> None:
        """Replaces each direction by the orthogonalised one; a collective call."""
        from torch.distributed import all_to_all_single

        all_to_all_single(
            self._gathered, self._shards, self._received, self._sent, group=self._group
        )
        for piece in self._pieces:
            piece.whole.copy_(piece.received)
        self._whole.orthogonalize()
        for piece in self._pieces:
            piece.received.copy_(piece.whole)
        all_to_all_single(
            self._shards, self._gathered, self._sent, self._received, group=self._group
        )
