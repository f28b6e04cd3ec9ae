"""The peak of forward and backward: gathered modules, gradients and activations over time.

The order of allocations is that of torch 2.13's fully_shard: the root's parameters are gathered for
the whole backward pass; each block is gathered before its use, with the next one prefetched in the
backward pass; a gradient is copied into the input of the reduce-scatter, which is freed after the
gradients of the following block have been computed.
Source: torch.distributed.fsdp._fully_shard (_fsdp_param_group.py, _fsdp_collectives.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .models.shapes import Shape

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")


@dataclass(frozen=True)
class Unit:
    """Bytes of a module whose parameters are gathered and freed together.

    Attributes:
        gathered: gathered parameters, with padding; 0 without FSDP2.
        gradients: gradients of the whole parameters.
        reduced: input of the reduce-scatter, with padding; 0 without FSDP2.
        padded: gradients of uneven parameters, which are padded before they are reduced.
        kept: gradients that the rank keeps.
        activations: tensors saved for the backward pass.
        working: further tensors at the start of the backward pass of the module.
    """

    gathered: int = 0
    gradients: int = 0
    reduced: int = 0
    padded: int = 0
    kept: int = 0
    activations: int = 0
    working: int = 0

    def __add__(self, other: Unit) -> Unit:
        return Unit(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))


@dataclass(frozen=True)
class Schedule:
    """The units of a model in the order of the forward pass.

    Attributes:
        first: the root's parameters before the blocks; their gradients come last.
        blocks: the blocks, which are the units of FSDP2 besides the root.
        last: the root's parameters after the blocks; their gradients come first.
        reshard: whether blocks are freed after their forward pass (ZeRO-3, not ZeRO-2).
    """

    first: Unit
    blocks: tuple[Unit, ...]
    last: Unit
    reshard: bool = True

    def without_activations(self) -> Schedule:
        """A copy that counts no activations."""
        units = (self.first, *self.blocks, self.last)
        first, *blocks, last = (replace(unit, activations=0, working=0) for unit in units)
        return replace(self, first=first, blocks=tuple(blocks), last=last)

    def peak(self) -> int:
        """The most bytes beyond weights and states during a forward and a backward pass."""
        root = self.first.gathered + self.last.gathered
        saved, before, kept_blocks, found = self.first.activations, root, 0, 2 * root
        for block in self.blocks:
            kept_blocks = block.gathered + (0 if self.reshard else kept_blocks)
            # The buffers of this and of the previous all-gather.
            found = max(found, root + kept_blocks + before + block.gathered + saved)
            saved, before = saved + block.activations, block.gathered
        found = max(found, root + kept_blocks + before + saved + self.last.activations)
        done, reducing = self.last.gradients, 0
        for i in reversed(range(len(self.blocks))):
            block = self.blocks[i]
            near = self.blocks[max(0, i - 1) if self.reshard else 0 : i]
            now = root + done + sum(unit.gathered for unit in near) + saved
            found = max(found, now + block.gathered + reducing + block.working)
            # At the end, its activations are freed and its gradients are complete.
            saved, now = saved - block.activations, now - block.activations + block.gradients
            found = max(found, now + block.gathered + reducing)
            reducing = block.reduced
            found = max(found, now + block.padded + reducing)
            done += block.kept
        return max(found, root + done + self.first.gradients + reducing + saved)


def block_of(name: str) -> str | None:
    """The block of a parameter: its name up to the first number; None for the root."""
    found = _BLOCK.match(name)
    return found[0] if found else None


def schedule(
    shapes: Sequence[Shape],
    params: Sequence[torch.Tensor],
    parts: Sequence[int],
    grad_dtype: torch.dtype | None,
    stage: int,
) -> Schedule:
    """The schedule of a model without activations.

    Args:
        shapes: the shapes before FSDP2.
        params: tensors of these shapes.
        parts: the number of ranks over which each of them is sharded.
        grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
        stage: the ZeRO stage; with 1, nothing is gathered.
    """
    blocks: dict[str, Unit] = {}
    first, last = Unit(), Unit()
    for shape, param, count in zip(shapes, params, parts, strict=True):
        size = param.dtype.itemsize
        grad = (grad_dtype or param.dtype).itemsize if param.requires_grad else 0
        unit = Unit(gradients=param.numel() * grad, kept=param.numel() * grad)
        if stage > 1 and count > 1 and param.dim():
            rows = -(-param.shape[0] // count)
            part = rows * (param.numel() // max(1, param.shape[0]))
            padded = part * count
            unit = Unit(
                gathered=padded * size,
                gradients=unit.gradients,
                reduced=padded * grad,
                padded=padded * grad if padded > param.numel() else 0,
                kept=part * grad,
            )
        key = block_of(shape.name)
        if key is not None:
            blocks[key] = blocks.get(key, Unit()) + unit
        elif blocks:
            last += unit
        else:
            first += unit
    return Schedule(first, tuple(blocks.values()), last, reshard=stage == 3)
