"""The simplest experiment: fit a line to y = 2x + 1 plus noise by gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from onepass.training import Trainer, loader
from onepass_tools.compare.algorithms import ALGORITHMS

POINTS, NOISE, LR, STEPS = 100, 0.1, 0.1, 100
BATCHES = {"batch: all 100": None, "mini-batch: 10": 10, "stochastic: 1": 1}


def points(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x and y of 100 points of y = 2x + 1 + 0.1 noise, x in [-1, 1], each [100, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, POINTS)[:, None]
    return x, 2 * x + 1 + NOISE * torch.randn(POINTS, 1, generator=generator)


def trainer(key: str, lr: float, **options: Any) -> Trainer:
    """A Trainer for nn.Linear(1, 1) with initial weight and bias -1."""
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, -1.0)
    return Trainer(
        model,
        key,
        lr,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
        max_grad_norm=None,
        **options,
    )


def run_algorithms() -> dict[str, Any]:
    """Runs each algorithm at lr 0.1 on all points; returns losses, weights and the exact fit."""
    x, y = points()
    design = torch.cat([x, torch.ones_like(x)], 1)
    exact = torch.linalg.lstsq(design, y).solution.flatten()
    runs = {}
    for algorithm in ALGORITHMS:
        run = trainer(algorithm.name, LR, **algorithm.options)
        path = [_weights(run.model)]
        for _ in range(STEPS):
            run.train_step(x, y)
            path.append(_weights(run.model))
        runs[algorithm.key] = {"loss": [*run.losses, run.evaluate([(x, y)])], "path": path}
    floor = float(((design @ exact[:, None] - y) ** 2).mean())
    return {"x": x.flatten().tolist(), "y": y.flatten().tolist(), "exact": exact.tolist(),
            "floor": floor, "lr": LR, "runs": runs}  # fmt: skip


def run_batches(samples: int = 1000) -> dict[str, Any]:
    """Runs plain SGD over the same number of samples with batches of 100, 10 and 1.

    Returns:
        For each batch size: the samples seen and the loss on all points after each step, and lr.
    """
    x, y = points()
    found = {}
    for label, size in BATCHES.items():
        run = trainer("sgd", LR)
        seen, losses = [0], [run.evaluate([(x, y)])]
        while seen[-1] < samples:
            for data, target in loader(TensorDataset(x, y), size, seed=seen[-1]):
                run.train_step(data, target)
                seen.append(seen[-1] + len(data))
                losses.append(run.evaluate([(x, y)]))
        found[label] = {"samples": seen, "loss": losses, "lr": LR}
    return found


def _weights(model: nn.Module) -> list[float]:
    return [float(p.detach()) for p in model.parameters()]
