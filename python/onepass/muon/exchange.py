"""Directions of DTensors: each matrix is orthogonalised once, by one rank.

Each rank has a shard of each direction. One all-to-all brings the shards of a matrix together on
the rank that orthogonalises it, and a second one brings the result back. Matrices are exchanged in
several rounds: while a rank multiplies the matrices of one round, those of later rounds arrive and
those of earlier rounds return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..engine.hyper_table import capturing
from ..engine.tensor_access import check_mesh
from .batches import Batch, Direction, Directions, Settings, units_of
from .matrices import Matrices

MOST_ROUNDS = 16
"""The most rounds of an exchange. With n rounds, 1/n of the time of the two transfers does not
overlap with products."""

ROUND_NUMEL = 1 << 22
"""The least elements per rank of a round. It avoids many small transfers and has not been tuned."""


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
            order of ranks, or over a mesh without this rank; or its local tensor is not contiguous.
    """
    from torch.distributed.tensor import Shard

    group, dims = None, []
    for owner, which in zip(owners, names, strict=True):
        mesh = owner.device_mesh
        check_mesh(mesh)
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


def schedule_of(
    found: Sequence[Direction], ranks: int, settings: Settings, device: torch.device
) -> list[list[list[int]]]:
    """The rounds of the exchange; the products of one rank cost about the same in each round.

    The result depends only on the arguments, so it is the same on every rank. A round consists of
    whole batches of products, so the number of rounds does not change the bits of the products.

    Args:
        found: the whole directions.
        ranks: the number of ranks.
        settings: the options of the products.
        device: the device of the products.

    Returns:
        For each round and each rank, the indices of the directions that the rank orthogonalises.
        Directions without elements are left out.
    """
    costs = [cost_of(one.matrices) for one in found]
    owner = owners_of(costs, ranks)
    number = sum(one.numel for one in found) // (ranks * ROUND_NUMEL)
    number = max(1, min(number, MOST_ROUNDS))
    rounds: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in range(number)]
    for rank in range(ranks):
        own = [i for i in range(len(found)) if owner[i] == rank and found[i].numel]
        total, before = sum(costs[i] for i in own), 0
        for unit in units_of([found[i] for i in own], settings, device):
            members = [own[k] for k in unit]
            rounds[before * number // total][rank] += members
            before += sum(costs[i] for i in members)
    return [one for one in rounds if any(one)]


class _Piece(NamedTuple):
    """A shard of a whole direction that this rank orthogonalises, and its place when received."""

    whole: torch.Tensor
    received: torch.Tensor


class _Round(NamedTuple):
    """The directions that are exchanged together.

    Attributes:
        shards: this rank's shards of the directions of all ranks, in the order of their owners.
        gathered: the shards of this rank's directions, in the order of the ranks they come from.
        sent, received: the elements of shards and of gathered for each rank.
        pieces: the parts of gathered.
        batches: the products of this rank's directions.
    """

    shards: torch.Tensor
    gathered: torch.Tensor
    sent: list[int]
    received: list[int]
    pieces: list[_Piece]
    batches: list[Batch]


class _Transfers:
    """The all-to-alls of one step that have started and not been waited for.

    On a GPU, waiting makes the current stream wait and does not block the host.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._pending: list[Any] = []
        # A captured graph has the transfers in the stream of the capture, without overlap.
        self._overlaps = not capturing()

    def start(
        self, target: torch.Tensor, source: torch.Tensor, received: list[int], sent: list[int]
    ) -> Any:
        """Starts an all-to-all and returns its handle; None if it need not be waited for."""
        from torch.distributed import all_to_all_single

        work = all_to_all_single(
            target, source, received, sent, group=self._group, async_op=self._overlaps
        )
        if work is not None:
            self._pending.append(work)
        return work

    def wait(self, work: Any) -> None:
        """Waits for an all-to-all."""
        if work is not None:
            work.wait()
            self._pending.remove(work)

    def finish(self) -> None:
        """Waits for all that have started."""
        while self._pending:
            self.wait(self._pending[0])

    def abandon(self) -> None:
        """Waits for all that have started after an error, and ignores further errors."""
        while self._pending:
            with suppress(BaseException):
                self._pending.pop().wait()


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

        self._group, self._dims = sharding.group, sharding.dims
        self._ranks, self._me = get_world_size(self._group), get_rank(self._group)
        self._shapes = [
            [
                (*shape[:dim], size, *shape[dim + 1 :])
                for size in shard_sizes(shape[dim], self._ranks)
            ]
            for shape, dim in zip(sharding.shapes, sharding.dims, strict=True)
        ]
        self._sizes = [[math.prod(shape) for shape in shapes] for shapes in self._shapes]
        schedule = schedule_of(found, self._ranks, settings, device)
        own = sorted(i for parts in schedule for i in parts[self._me])
        self._place = {i: k for k, i in enumerate(own)}
        self._whole = Directions([found[i] for i in own], settings, device)
        dtype = settings.dtype(device)
        lengths = sum(size[self._me] for size in self._sizes), sum(sum(self._sizes[i]) for i in own)
        shards, gathered = (torch.zeros(n, dtype=dtype, device=device) for n in lengths)
        # Directions without elements are in no round.
        local = [shapes[self._me] for shapes in self._shapes]
        self.tensors = [shards[:0].view(shape) if 0 in shape else shards for shape in local]
        self._rounds: list[_Round] = []
        self.memory = [*self._whole.memory, shards, gathered]
        for parts in schedule:
            one = self._round(parts, shards, gathered)
            self._rounds.append(one)
            shards, gathered = shards[len(one.shards) :], gathered[len(one.gathered) :]

    def _round(
        self, parts: list[list[int]], shards: torch.Tensor, gathered: torch.Tensor
    ) -> _Round:
        """Lays out a round and sets :attr:`tensors` of its directions.

        Args:
            parts: the indices of the directions of each rank.
            shards, gathered: the memory of this round and all later ones.
        """
        me, own, sizes = self._me, parts[self._me], self._sizes
        at = 0
        for i in chain.from_iterable(parts):
            numel = sizes[i][me]
            self.tensors[i] = shards[at : at + numel].view(self._shapes[i][me])
            at += numel
        pieces, start, begin = [], dict.fromkeys(own, 0), 0
        for rank in range(self._ranks):
            for i in own:
                shape, dim = self._shapes[i][rank], self._dims[i]
                whole = self._whole.tensors[self._place[i]].narrow(dim, start[i], shape[dim])
                pieces.append(_Piece(whole, gathered[begin : begin + sizes[i][rank]].view(shape)))
                begin += sizes[i][rank]
                start[i] += shape[dim]
        return _Round(
            shards[:at],
            gathered[:begin],
            [sum(sizes[i][me] for i in part) for part in parts],
            [sum(sizes[i][rank] for i in own) for rank in range(self._ranks)],
            pieces,
            self._whole.batches_of({self._place[i] for i in own}),
        )

    def orthogonalize(self) -> None:
        """Replaces each direction by the orthogonalised one; a collective call.

        All ranks start the same all-to-alls in the same order: all arrivals, then the return of
        each round. An arrival thus never waits for the products of another rank. After an error
        this rank waits for the all-to-alls that it has started, and starts no others.
        """
        transfers = _Transfers(self._group)
        try:
            arrivals = [
                transfers.start(one.gathered, one.shards, one.received, one.sent)
                for one in self._rounds
            ]
            for one, arrival in zip(self._rounds, arrivals, strict=True):
                transfers.wait(arrival)
                for piece in one.pieces:
                    piece.whole.copy_(piece.received)
                self._whole.orthogonalize(one.batches)
                for piece in one.pieces:
                    piece.received.copy_(piece.whole)
                transfers.start(one.shards, one.gathered, one.sent, one.received)
            transfers.finish()
        except BaseException:
            transfers.abandon()
            raise
