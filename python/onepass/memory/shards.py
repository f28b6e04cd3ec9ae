"""The part of a model that one of several GPUs holds under FSDP2 or ZeRO-1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .models.shapes import Model, Shape

KINDS = ("fsdp2", "zero1")


def sharded(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """The shapes on the first of ``count`` ranks under FSDP2.

    FSDP2 shards every parameter along its first dimension d0 into ceil(d0 / count) rows per rank,
    and pads the last ranks to this size.
    Source: torch.distributed.fsdp.fully_shard, whose shards are padded Shard(0).
    """
    return [
        replace(s, shape=(-(-s.shape[0] // count), *s.shape[1:])) if s.shape else s for s in shapes
    ]


def dealt(groups: Iterable[Sequence[Shape]], count: int) -> list[list[Shape]]:
    """The shapes whose states each of ``count`` ranks holds under ZeRO-1.

    The parameters of each group are assigned in descending order of size, each to the rank with the
    fewest elements so far. Ranks without parameters are left out.
    Source: torch.distributed.optim.ZeroRedundancyOptimizer, which assigns whole parameters.
    """
    ranks: list[list[Shape]] = [[] for _ in range(count)]
    sizes = [0] * count
    for group in groups:
        for shape in sorted(group, key=lambda s: -s.numel):
            rank = sizes.index(min(sizes))
            ranks[rank].append(shape)
            sizes[rank] += shape.numel
    return [rank for rank in ranks if rank]


def check(model: Model, count: int) -> str:
    """A remark if parameters have fewer rows than there are shards; empty otherwise."""
    small = [s for s in model.shapes if s.shape and s.shape[0] < count]
    if not small:
        return ""
    return (
        f"{len(small)} parameters have fewer rows than there are shards ({count}): some ranks hold "
        "nothing of them, the first a row"
    )
