"""What one of several GPUs holds: as FSDP2 or ZeRO-1 divides a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .models.shapes import Model, Shape

KINDS = ("fsdp2", "zero1")


def sharded(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """The shapes on the first of ``count`` ranks under FSDP2, which cuts every parameter along its
    first dimension: ceil(d0 / count) rows, with which the last ranks are padded.

    Source: torch.distributed.fsdp.fully_shard, whose shards are Shard(0) and padded.
    """
    return [
        replace(s, shape=(-(-s.shape[0] // count), *s.shape[1:])) if s.shape else s for s in shapes
    ]


def dealt(groups: Iterable[Sequence[Shape]], count: int) -> list[list[Shape]]:
    """The shapes whose states each of ``count`` ranks holds under ZeRO-1: of each group the largest
    first, to the rank that has the fewest elements so far. Ranks that hold none are left out.

    Source: torch.distributed.optim.ZeroRedundancyOptimizer, which deals whole parameters out.
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
    """What is to be said of a division; empty where it is even."""
    small = [s for s in model.shapes if s.shape and s.shape[0] < count]
    if not small:
        return ""
    return (
        f"{len(small)} parameters have fewer rows than there are shards ({count}): some ranks hold "
        "nothing of them, the first a row"
    )
