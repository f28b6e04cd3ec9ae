"""What one of several GPUs holds: as FSDP2 or ZeRO-1 divides a model."""

from __future__ import annotations

from collections.abc import Sequence
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


def partition(numels: Sequence[int], count: int) -> int:
    """Elements of the first of ``count`` ranks' part of a flat list of parameters, as ZeRO-1
    divides the states: ceil(total / count).

    Source: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter
    models" (2020), P_os.
    """
    return -(-sum(numels) // count)


def check(model: Model, count: int) -> str:
    """What is to be said of a division; empty where it is even."""
    small = [s for s in model.shapes if s.shape and s.shape[0] < count]
    if not small:
        return ""
    return (
        f"{len(small)} parameters have fewer rows than there are shards ({count}): some ranks hold "
        "nothing of them, the first a row"
    )
