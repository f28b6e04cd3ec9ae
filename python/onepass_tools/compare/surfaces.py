"""Paths of the algorithms over surfaces of two variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onepass.training import make_optimizer
from onepass_tools.compare.algorithms import Algorithm

STEPS = 200
RATES = tuple(10.0 ** (k / 4) for k in range(-16, 3))  # 1e-4 to 3, four a decade
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Surface:
    """A function of x and y, drawn in ``box`` (x from, to, y from, to); the paths begin at
    ``start``. Normal noise of standard deviation ``noise`` is added to each gradient."""

    key: str
    label: str
    f: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    box: tuple[float, float, float, float]
    noise: float = 0.0

    @property
    def lowest(self) -> float:
        return float(self.f(*self.minima[0]))


def beale(x: Any, y: Any) -> Any:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


ROOT2 = math.sqrt(2)
SURFACES = (
    Surface(
        "ravine",
        "ravine: ½ (x² + 50 y²)",
        lambda x, y: 0.5 * (x**2 + 50 * y**2),
        (-4.0, 1.0),
        ((0, 0),),
        (-5, 2.5, -1.6, 1.6),
    ),
    Surface(
        "rosenbrock",
        "Rosenbrock: (1 - x)² + 100 (y - x²)²",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        (-1.5, 1.0),
        ((1, 1),),
        (-2.2, 2.0, -1.0, 3.2),
    ),
    Surface("beale", "Beale", beale, (1.0, 1.5), ((3, 0.5),), (-0.5, 4.5, -1.5, 2.2)),
    Surface(
        "himmelblau",
        "Himmelblau: (x² + y - 11)² + (x + y² - 7)²",
        lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
        (0.0, -0.5),
        ((3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848127)),
        (-5.5, 5.5, -5.5, 5.5),
    ),
    Surface(
        "saddle",
        "saddle: x² - y² + ¼ y⁴",
        lambda x, y: x**2 - y**2 + 0.25 * y**4,
        (1.5, 0.01),
        ((0, ROOT2), (0, -ROOT2)),
        (-1.8, 1.8, -2.2, 2.2),
    ),
    Surface(
        "noisy",
        "noisy quadratic: ½ (x² + 4 y²), σ = 1",
        lambda x, y: 0.5 * (x**2 + 4 * y**2),
        (-4.0, 2.0),
        ((0, 0),),
        (-5, 2.5, -2.6, 2.6),
        noise=1.0,
    ),
)


@dataclass(frozen=True)
class Path:
    """Where an algorithm went, [steps + 1, 2], and the loss there, at its best rate."""

    surface: str
    algorithm: str
    lr: float
    points: Array
    losses: Array


def descend(
    surface: Surface,
    key: str,
    rates: Sequence[float],
    steps: int = STEPS,
    seed: int = 0,
    **options: Any,
) -> Array:
    """Points [rates, steps + 1, 2] from the start, each rate by itself.

    One optimizer takes all rates at once, as groups: rules work on elements, so the paths do not
    know of each other (there is no clipping here).
    """
    start = torch.tensor(surface.start)
    points = [torch.nn.Parameter(start.clone()) for _ in rates]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(points, rates, strict=True)]
    optimizer = make_optimizer(key, groups, 0.0, **options)
    generator = torch.Generator().manual_seed(seed)
    path = [torch.stack([p.detach().clone() for p in points])]
    for _ in range(steps):
        where = path[-1].clone().requires_grad_()
        surface.f(where[:, 0], where[:, 1]).sum().backward()
        noise = surface.noise * torch.randn(2, generator=generator)
        assert isinstance(where.grad, Tensor)
        for p, grad in zip(points, where.grad, strict=True):
            p.grad = grad + noise
        optimizer.step()
        path.append(torch.stack([p.detach().clone() for p in points]))
    return torch.stack(path, 1).double().numpy()


def best_path(surface: Surface, algorithm: Algorithm, steps: int = STEPS) -> Path:
    """The path of the rate whose mean loss over the path is lowest: that got down soonest.

    A loss above that of the start counts as its double, so that one that has left for infinity is
    not compared by how far it went.
    """
    points = descend(surface, algorithm.key, RATES, steps, **algorithm.options)
    with np.errstate(all="ignore"):
        losses = np.asarray(surface.f(points[..., 0], points[..., 1])) - surface.lowest
        worst = 2 * losses[:, :1]
        capped = np.where(losses <= worst, losses, worst)
    best = int(capped.mean(1).argmin())
    return Path(surface.key, algorithm.key, RATES[best], points[best], losses[best])
