"""Two training tasks, a small CNN and a small transformer, with data that every machine has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onepass_tools.demo.data import Batches, load
from onepass_tools.demo.model import GPT, Shape

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: the name of the task.
        about: a description for the report.
        model: seed -> a new model.
        batch: (seed, step) -> the batch of a step.
        loss: (output of the model, target) -> the loss.
        train, validation: fixed batches for the losses at the end of a run; ``train`` is the
            training data or a part of it.
        steps: the number of training steps.
        target: the training loss for the figure "steps to target".
        unit: the unit of the losses.
    """

    name: str
    about: str
    model: Callable[[int], nn.Module]
    batch: Callable[[int, int], Batch]
    loss: Callable[[Any, Any], Tensor]
    train: list[Batch]
    validation: list[Batch]
    steps: int
    target: float
    unit: str


# --- images: eight patterns, shifted, faded and noisy -----------------------------------------

SIDE, CLASSES, BATCH = 12, 8, 32
TRAINED, VALIDATED = 512, 1024


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns images [count, 1, 12, 12] and their classes [count].

    An image is the smooth random pattern of its class, rolled by up to two pixels in each direction
    and scaled by a random contrast, plus noise of the same strength as the pattern.
    """
    pattern = torch.Generator().manual_seed(1234)
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=pattern)
    patterns = functional.avg_pool2d(functional.pad(patterns, (1, 1, 1, 1), "circular"), 3, 1)
    patterns = patterns / patterns.std((1, 2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    shift = torch.randint(-2, 3, (count, 2), generator=generator)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    moved = torch.stack(
        [
            patterns[int(k)].roll((int(dy), int(dx)), (1, 2))
            for k, (dy, dx) in zip(label, shift, strict=True)
        ]
    )
    return contrast * moved + torch.randn(moved.shape, generator=generator), label


def cnn(seed: int) -> nn.Module:
    """A CNN with 3,896 parameters: two convolutions with group norm, and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


def cnn_task(steps: int) -> Task:
    """The CNN task; it has few images, so that there is a generalisation gap."""
    x, y = images(TRAINED, 1)
    held_out = images(VALIDATED, 2)

    def batch(seed: int, step: int) -> Batch:
        epoch, place = divmod(step, TRAINED // BATCH)
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed << 20 | epoch))
        chosen = order[place * BATCH :][:BATCH]
        return x[chosen], y[chosen]

    return Task(
        "CNN",
        f"{TRAINED} images of {SIDE} x {SIDE} pixels, {CLASSES} classes, made by the command; "
        f"validated on {VALIDATED} others; batches of {BATCH}",
        cnn,
        batch,
        functional.cross_entropy,
        [(x, y)],
        [held_out],
        steps,
        0.5,
        "nats",
    )


# --- text -------------------------------------------------------------------------------------

SHAPE, WINDOWS = Shape(context=32, width=32, depth=2, heads=2), 8


class Text(nn.Module):
    """The GPT of the demo as a module whose output is the loss."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gpt = GPT(SHAPE)

    def forward(self, windows: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the mean loss of (inputs, targets)."""
        loss: Tensor = self.gpt(*windows)
        return loss


def _loss(output: Tensor, _: Tensor) -> Tensor:
    return output


def transformer_task(steps: int, validation_batches: int = 16) -> Task:
    """The transformer task on 16 KiB of Python's library, which training sees several times."""
    corpus = load(400_000)
    pieces = corpus.train.unfold(0, 1024, len(corpus.train) // 16)[:16]
    text, held_out = pieces.flatten(), corpus.validation
    made: dict[int, Batches] = {}

    def batch(seed: int, step: int) -> Batch:
        if seed not in made:
            made[seed] = Batches(text, max(steps, 1), WINDOWS, SHAPE.context, seed)
        windows = made[seed][step]
        return windows, windows[1]

    def fixed(part: Tensor) -> list[Batch]:
        windows = Batches(part, validation_batches, 4 * WINDOWS, SHAPE.context, 999)
        return [(windows[i], windows[i][1]) for i in range(validation_batches)]

    return Task(
        "transformer",
        f"byte-level GPT of depth {SHAPE.depth} and width {SHAPE.width} on {len(text):,} bytes of "
        f"Python's library, validated on other files; batches of {WINDOWS} windows of "
        f"{SHAPE.context}",
        Text,
        batch,
        _loss,
        fixed(text),
        fixed(held_out),
        steps,
        3.0,
        "nats per byte",
    )


def is_finite(loss: float) -> bool:
    """Whether a run has not diverged: the loss is finite and below 50 nats."""
    return math.isfinite(loss) and loss < 50
