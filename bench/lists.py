"""Parameter lists: what a step is taken over."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ParamList:
    """The shapes of a model's parameters.

    Attributes:
        name: as in the results.
        shapes: one per tensor.
        offset: elements between the start of a tensor's storage and the tensor.
    """

    name: str
    shapes: Shapes
    offset: int = 0

    @property
    def numel(self) -> int:
        """Elements in all tensors together."""
        return sum(map(prod, self.shapes))

    @property
    def scalars(self) -> bool:
        """Whether every tensor has one element: a step is then host time and nothing else."""
        return self.numel == len(self.shapes) == sum(prod(s) == 1 for s in self.shapes)

    def empty(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """New tensors of these shapes, each in an allocation of its own."""
        if not self.offset:  # gradients that a backward pass makes are not views either
            return [torch.empty(shape, dtype=dtype) for shape in self.shapes]
        return [
            torch.empty(prod(shape) + self.offset, dtype=dtype)[self.offset :].view(shape)
            for shape in self.shapes
        ]

    def normal(self, std: float, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        """Normal numbers of this standard deviation, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        tensors = self.empty(dtype)
        for tensor in tensors:
            tensor.normal_(0.0, std, generator=generator)
        return tensors


def one(millions: int) -> ParamList:
    """One tensor."""
    return ParamList(f"{millions}M", ((millions * 1_000_000,),))


def many(tensors: int, numel: int, offset: int = 0) -> ParamList:
    """Tensors of one length; with an offset, none of them starts where a vector load likes it."""
    suffix = f"+{offset}" if offset else ""
    return ParamList(f"{tensors}x{numel}{suffix}", ((numel,),) * tensors, offset)


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> ParamList:
    """The shapes of GPT-2 with tied embeddings; 12, 768, 50257, 1024 is the small one."""
    block: Shapes = (
        (width,),
        (width,),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    )
    shapes = ((vocabulary, width), (context, width), *block * layers, (width,), (width,))
    return ParamList(f"gpt2-{sum(map(prod, shapes)) / 1e6:.3g}M", shapes)


def llama(width: int, layers: int, vocabulary: int) -> ParamList:
    """The shapes of Llama 3 with tied embeddings; 2048, 16, 128256 is the one of 1.2 billion."""
    narrow, inner = width // 4, 4 * width
    block: Shapes = (
        (width, width),
        (narrow, width),
        (narrow, width),
        (width, width),
        (inner, width),
        (inner, width),
        (width, inner),
        (width,),
        (width,),
    )
    shapes = ((vocabulary, width), *block * layers, (width,))
    return ParamList(f"llama3-{sum(map(prod, shapes)) / 1e9:.3g}B", shapes)
