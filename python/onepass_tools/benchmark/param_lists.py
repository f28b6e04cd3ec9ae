"""Parameter lists for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ParamList:
    """The shapes of a model's parameters.

    Attributes:
        name: the name in the results.
        shapes: one shape per tensor.
        offset: the number of elements between the start of a tensor's storage and the tensor.
        zero_rows: whether 7 of 8 rows of each gradient are zero, like the rows of an embedding that
            a batch does not look up.
    """

    name: str
    shapes: Shapes
    offset: int = 0
    zero_rows: bool = False

    @property
    def numel(self) -> int:
        """The number of elements in all tensors."""
        return sum(map(prod, self.shapes))

    @property
    def scalars(self) -> bool:
        """Whether every tensor has one element, so that a step consists only of host time."""
        return self.numel == len(self.shapes) == sum(prod(s) == 1 for s in self.shapes)

    def empty(self, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
        """Makes uninitialized tensors of these shapes, each in its own allocation."""
        if not self.offset:  # not views, like the gradients of a backward pass
            return [torch.empty(shape, dtype=dtype, device=device) for shape in self.shapes]
        return [
            torch.empty(prod(s) + self.offset, dtype=dtype, device=device)[self.offset :].view(s)
            for s in self.shapes
        ]

    def normal(
        self, std: float, dtype: torch.dtype, seed: int, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """Makes tensors of normal numbers; they depend only on the seed and the device."""
        generator = torch.Generator(device).manual_seed(seed)
        tensors = self.empty(dtype, device)
        for tensor in tensors:
            tensor.normal_(0.0, std, generator=generator)
        return tensors

    def gradients(
        self, std: float, dtype: torch.dtype, seed: int, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """Makes gradients of normal numbers; if ``zero_rows``, 7 of 8 rows are zero."""
        tensors = self.normal(std, dtype, seed, device)
        for tensor in tensors if self.zero_rows else ():
            tensor[torch.arange(len(tensor), device=device) % 8 != 0] = 0
        return tensors


def in_words(numel: int) -> str:
    """A number of elements in short form: 100M, 1.5B, 2500."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if numel >= size:
            scaled = numel / size
            # All digits if the text has fewer than 6 characters; otherwise 3 significant digits.
            return f"{scaled:.10g}{unit}" if len(f"{scaled:.10g}") < 6 else f"{scaled:.3g}{unit}"
    return str(numel)


def one(numel: int) -> ParamList:
    """A list of one tensor with ``numel`` elements."""
    return ParamList(in_words(numel), ((numel,),))


def many(tensors: int, numel: int, offset: int = 0) -> ParamList:
    """A list of equal tensors; with an offset, their starts are misaligned for vector loads."""
    suffix = f"+{offset}" if offset else ""
    return ParamList(f"{tensors}x{numel}{suffix}", ((numel,),) * tensors, offset)


def embedding(rows: int, width: int = 4096) -> ParamList:
    """A list of one matrix; 7 of 8 rows of its gradient are zero."""
    return ParamList(f"rows-{in_words(rows * width)}", ((rows, width),), zero_rows=True)


def _linear(out: int, inputs: int) -> Shapes:
    """The shapes of the weight and bias of a linear layer."""
    return ((out, inputs), (out,))


def gpt2(layers: int = 12, width: int = 768, vocab: int = 50257, context: int = 1024) -> ParamList:
    """GPT-2 with tied embeddings (Radford et al. 2019).

    The default is GPT-2 small, with 124,439,808 parameters.
    """
    norm: Shapes = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    block = (*norm, *attention, *norm, *mlp)
    shapes = ((vocab, width), (context, width), *block * layers, *norm)
    return ParamList(f"gpt2-{in_words(sum(map(prod, shapes)))}", shapes)


LLAMA_PARTS = (1, 2, 4, 8, 16, 32)


def llama3(part: int = 1) -> ParamList:
    """Llama 3 with 8 billion parameters (Grattafiori et al. 2024), or a fraction of the model.

    A fraction has layers of the original size; the number of layers and the vocabulary are divided
    by ``part``.

    Args:
        part: one of LLAMA_PARTS; 1 is the whole model, with 8,030,261,248 parameters.

    Raises:
        ValueError: ``part`` is not one of LLAMA_PARTS.
    """
    if part not in LLAMA_PARTS:
        raise ValueError(f"part must be one of {', '.join(map(str, LLAMA_PARTS))}; got {part}")
    width, inner, heads = 4096, 14336, 1024
    attention = ((width, width), (heads, width), (heads, width), (width, width))
    block = (*attention, (inner, width), (inner, width), (width, inner), (width,), (width,))
    ends = (128_256 // part, width)
    shapes = (ends, *block * (32 // part), (width,), ends)
    return ParamList("llama3-8B" if part == 1 else f"llama3-8B/{part}", shapes)


def vit_l16() -> ParamList:
    """ViT-L/16 for 224 x 224 images and 1,000 classes (Dosovitskiy et al. 2021), as in torchvision.

    The model has 304,326,632 parameters.
    """
    width, norm = 1024, ((1024,), (1024,))
    attention = (*_linear(3 * width, width), *_linear(width, width))
    block = (*norm, *attention, *norm, *_linear(4 * width, width), *_linear(width, 4 * width))
    patches: Shapes = ((width, 3, 16, 16), (width,))
    tokens: Shapes = ((1, 1, width), (1, 14 * 14 + 1, width))
    shapes = (*tokens, *patches, *block * 24, *norm, *_linear(1000, width))
    return ParamList("vit-l16", shapes)


def resnet50() -> ParamList:
    """ResNet-50 for 1,000 classes (He et al. 2016), as in torchvision.

    The model has 25,557,032 parameters in 161 tensors, most of which are small.
    """

    def convolution(out: int, inputs: int, size: int) -> Shapes:
        return ((out, inputs, size, size), (out,), (out,))  # and the norm

    shapes = list(convolution(64, 3, 7))
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += convolution(width, inputs, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(out, width, 1)
            if block == 0:  # the shortcut also changes the width
                shapes += convolution(out, inputs, 1)
            inputs = out
    return ParamList("resnet50", (*shapes, *_linear(1000, 2048)))


NAMED: dict[str, Callable[[], ParamList]] = {
    "gpt2": gpt2,
    **{
        "llama3-8B" + (f"/{part}" if part > 1 else ""): partial(llama3, part)
        for part in LLAMA_PARTS
    },
    "vit-l16": vit_l16,
    "resnet50": resnet50,
    "2000x256": partial(many, 2000, 256),
    "20000x1": partial(many, 20_000, 1),
    "300x4096+1": partial(many, 300, 4096, 1),
}
"""The parameter lists that users can name."""
