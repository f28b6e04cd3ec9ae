"""A model as a list of parameter shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

EMBEDDING, NORM, MATRIX, CONV, BIAS = "embedding", "norm", "matrix", "convolution", "bias"


@dataclass(frozen=True)
class Shape:
    """The shape of a parameter.

    Attributes:
        name: the name in the model's state dict.
        shape: the shape of the tensor.
        kind: embedding, norm, matrix, convolution or bias (any other vector).
        trained: whether the parameter has a gradient and states.
        bits: bits per element of packed weights; None for the dtype of the run.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    trained: bool = True
    bits: float | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model as a list of parameters.

    Attributes:
        name: the name as requested.
        shapes: the parameters in the order of the model; a tensor shared by two layers occurs once.
        source: the page or file with the configuration.
        published: the published number of parameters; None if there is none.
        buffers: bytes of the buffers.
        tp_plan, ep_plan: names of modules or parameters, with ``*`` for numbers -> how tensor and
            expert parallelism divide them; empty if the model has no plan.
        config: the sizes that the formula of activations needs, by transformers' names, and
            ``head``, the vocabulary of the logits; empty if they are unknown.
    """

    name: str
    shapes: tuple[Shape, ...]
    source: str = ""
    published: int | None = None
    buffers: int = 0
    tp_plan: Mapping[str, str] = field(default_factory=dict, hash=False)
    ep_plan: Mapping[str, str] = field(default_factory=dict, hash=False)
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(shape.numel for shape in self.shapes)

    @property
    def trained(self) -> int:
        """The number of elements of the trained parameters."""
        return sum(shape.numel for shape in self.shapes if shape.trained)

    @property
    def convolutional(self) -> bool:
        """Whether more than half of the elements are in convolutions."""
        return 2 * sum(s.numel for s in self.shapes if s.kind == CONV) > self.numel

    def scaled(self, scale: float) -> Model:
        """A copy with the first dimension of each shape multiplied by ``scale``, but at least 1."""
        if scale == 1:
            return self
        shapes = (
            replace(s, shape=(max(1, round(s.shape[0] * scale)), *s.shape[1:])) if s.shape else s
            for s in self.shapes
        )
        name = f"{self.name} x {scale:g}"
        return replace(self, name=name, shapes=tuple(shapes), published=None, config={})

    def mapped(self, shapes: Iterable[Shape]) -> Model:
        """A copy with other shapes."""
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


def of_module(module: torch.nn.Module, name: str, source: str = "") -> Model:
    """The model of a module; a shared parameter occurs once."""
    shapes: dict[Any, Shape] = {}
    for prefix, part in module.named_modules():
        for key, param in part.named_parameters(recurse=False):
            if param not in shapes:
                full = f"{prefix}.{key}" if prefix else key
                kind = kind_of(part, param.shape)
                shapes[param] = Shape(full, tuple(param.shape), kind, param.requires_grad)
    plans = [dict(getattr(module, f"_{kind}_plan", None) or {}) for kind in ("tp", "ep")]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    return Model(name, tuple(shapes.values()), source, None, buffers, *plans)
