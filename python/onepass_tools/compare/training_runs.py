"""Training runs and their measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from onepass import AdamWScheduleFree
from onepass.training import Trainer
from onepass_tools.compare.algorithms import Algorithm
from onepass_tools.compare.tasks import Batch, Task, is_finite
from onepass_tools.demo.model import count_parameters
from onepass_tools.demo.train import state_bytes

WINDOW = 10  # steps over which training losses are averaged for "steps to target"
ITERATIONS = 20  # number of power iterations
WARMUP = 0.1  # fraction of the steps


@dataclass(frozen=True)
class Result:
    """The result of a run, with losses in the unit of the task.

    Attributes:
        task, algorithm, lr, seed: the settings of the run.
        train, validation: losses at the end on fixed batches; NaN if the run diverged.
        reached: the first step at which the mean of the last ten training losses is at most the
            target of the task; None if there is none.
        state_bytes: bytes of optimizer states per parameter.
        sharpness: see :func:`sharpness`; NaN if it was not requested.
        curve: the training loss of each step.
    """

    task: str
    algorithm: str
    lr: float
    seed: int
    train: float
    validation: float
    reached: int | None
    state_bytes: float
    sharpness: float
    curve: list[float]


def train(
    task: Task, algorithm: Algorithm, lr: float, seed: int, sharp: bool = False, **changes: Any
) -> Result:
    """Trains once: warm-up over a tenth of the steps, then cosine decay, with clipping at norm 1.

    A schedule-free run keeps the learning rate after the warm-up. It is evaluated at the averages
    of its weights. The seed determines weights and batches, independently of the algorithm.

    Args:
        task: the task.
        algorithm: the algorithm.
        lr: the highest learning rate.
        seed: the seed of the weights and batches.
        sharp: whether to compute the sharpness.
        changes: Trainer arguments that replace the defaults.
    """
    settings: dict[str, Any] = {
        "weight_decay": algorithm.decay,
        "loss": task.loss,
        "schedule": "cosine",
        "warmup_steps": int(WARMUP * task.steps),
        "schedule_options": {"total_steps": task.steps},
        "nan_guard": "off",
        **algorithm.options,
        **algorithm.training,
        **changes,
    }
    trainer = Trainer(task.model(seed), algorithm.name, lr, **settings)
    for step in range(task.steps):
        if not is_finite(trainer.train_step(*task.batch(seed, step))):
            break
    if isinstance(trainer.optimizer, AdamWScheduleFree):
        trainer.optimizer.eval()
    curve = trainer.losses
    alive = len(curve) == task.steps and is_finite(curve[-1])
    reached = None
    for step in range(WINDOW, len(curve) + 1):
        if sum(curve[step - WINDOW : step]) / WINDOW <= task.target:
            reached = step
            break
    return Result(
        task.name,
        algorithm.key,
        lr,
        seed,
        trainer.evaluate(task.train) if alive else math.nan,
        trainer.evaluate(task.validation) if alive else math.nan,
        reached,
        state_bytes(trainer.optimizer) / count_parameters(trainer.model),
        sharpness_of(task, trainer.model) if sharp and alive else math.nan,
        curve,
    )


def sharpness_of(task: Task, model: nn.Module) -> float:
    """The sharpness of the loss on at most 256 samples of the first fixed training batch."""
    model.eval()
    data, target = _first(task.train[0], 256)
    params = list(model.parameters())
    # Only the math attention kernel supports double backward.
    with sdpa_kernel(SDPBackend.MATH):
        return sharpness(lambda: task.loss(model(data), target), params)


def _first(batch: Batch, count: int) -> Batch:
    data, target = batch
    if isinstance(data, tuple):
        return tuple(part[:count] for part in data), target[:count]
    return data[:count], target[:count]


def sharpness(
    loss: Callable[[], Tensor], params: Sequence[Tensor], iterations: int | None = None
) -> float:
    """The largest eigenvalue of the Hessian of ``loss()``, by power iteration.

    A Hessian-vector product is the gradient of (gradient . vector); the parameters are not changed.
    If the eigenvalue of largest magnitude is negative, the iteration is repeated with the Hessian
    shifted by that eigenvalue. The estimate is a Rayleigh quotient, so it never exceeds the largest
    eigenvalue (Yao et al., "PyHessian", 2020).
    """
    gradient = torch.autograd.grad(loss(), params, create_graph=True)

    def product(vector: list[Tensor]) -> list[Tensor]:
        dot = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        return list(torch.autograd.grad(dot, params, retain_graph=True))

    def largest(shift: float) -> float:
        generator = torch.Generator().manual_seed(0)
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in params]
        value = 0.0
        for _ in range(iterations or ITERATIONS):
            norm = _dot(vector, vector) ** 0.5
            if norm == 0:
                return 0.0
            vector = [v / norm for v in vector]
            image = product(vector)
            image = [h + shift * v for h, v in zip(image, vector, strict=True)]
            value, vector = _dot(vector, image), image
        return value

    value = largest(0.0)
    return value if value >= 0 else largest(-value) + value


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
