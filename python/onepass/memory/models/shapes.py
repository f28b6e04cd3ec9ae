"""A model as the shapes of its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

EMBEDDING, NORM, MATRIX, CONV, BIAS = "embedding", "norm", "matrix", "convolution", "bias"


@dataclass(frozen=True)
class Shape:
    """A parameter.

    Attributes:
        name: as in the model's state dict.
        shape: of the tensor.
        kind: embedding, norm, matrix, convolution or bias (any other vector).
        trained: whether it has a gradient and states.
        bits: of an element, where weights are packed; None for the dtype of the run.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    trained: bool = True
    bits: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A list of parameters.

    Attributes:
        name: as it was asked for.
        shapes: in the order of the model; a tensor that two layers share is there once.
        source: where its configuration and its number of parameters were published.
        published: that number, None where there is none to compare with.
    """

    name: str
    shapes: tuple[Shape, ...]
    source: str = ""
    published: int | None = None

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(shape.numel for shape in self.shapes)

    @property
    def trained(self) -> int:
        """Elements of those that are trained."""
        return sum(shape.numel for shape in self.shapes if shape.trained)

    @property
    def convolutional(self) -> bool:
        """Whether most elements are in convolutions."""
        return 2 * sum(s.numel for s in self.shapes if s.kind == CONV) > self.numel

    def scaled(self, scale: float) -> Model:
        """The same tensors with their first dimension scaled, at least 1."""
        if scale == 1:
            return self
        shapes = (
            replace(s, shape=(max(1, round(s.shape[0] * scale)), *s.shape[1:])) if s.shape else s
            for s in self.shapes
        )
        return replace(self, name=f"{self.name} x {scale:g}", shapes=tuple(shapes), published=None)

    def mapped(self, shapes: Iterable[Shape]) -> Model:
        """With other shapes."""
        return replace(self, shapes=tuple(shapes), published=None)


def kind_of(module: torch.nn.Module, shape: Sequence[int]) -> str:
    """The kind of a module's parameter."""
    from ...optim.mixed_precision import EMBEDDINGS, NORMS

    if isinstance(module, EMBEDDINGS):
        return EMBEDDING
    if isinstance(module, NORMS) or "norm" in type(module).__name__.lower():
        return NORM
    if len(shape) > 2 and "conv" in type(module).__name__.lower():
        return CONV
    return MATRIX if len(shape) > 1 else BIAS


def of_module(module: torch.nn.Module, name: str) -> Model:
    """A model that somebody wrote, by its parameters."""
    shapes: dict[Any, Shape] = {}
    for prefix, part in module.named_modules():
        for key, param in part.named_parameters(recurse=False):
            if param not in shapes:
                full = f"{prefix}.{key}" if prefix else key
                kind = kind_of(part, param.shape)
                shapes[param] = Shape(full, tuple(param.shape), kind, param.requires_grad)
    return Model(name, tuple(shapes.values()))
