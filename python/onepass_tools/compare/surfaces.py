"""Paths of the algorithms over functions of two variables."""

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
RATES = tuple(10.0 ** (k / 4) for k in range(-16, 3))  # 1e-4 to 3, four per decade
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Surface:
    """A function of x and y.

    Attributes:
        key: the name in results.
        label: the title in plots.
        f: the function.
        start: the start of all paths.
        minima: the minima, all of equal value.
        box: the plotted range: lowest x, highest x, lowest y, highest y.
        noise: the standard deviation of the normal noise added to each gradient.
    """

    key: str
    label: str
    f: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    box: tuple[float, float, float, float]
    noise: float = 0.0

    @property
    def lowest(self) -> float:
        """The value of the function at its minima."""
        return float(self.f(*self.minima[0]))


def beale(x: Any, y: Any) -> Any:
    """Beale's function, with its minimum 0 at (3, 0.5)."""
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
    """The path of an algorithm at its best rate.

    Attributes:
        surface: the key of the surface.
        algorithm: the key of the algorithm.
        lr: the learning rate.
        points: [steps + 1, 2].
        losses: [steps + 1], the function minus its minimum at these points.
    """

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
    """Returns the path for each rate, [rates, steps + 1, 2].

    One optimizer runs all rates at once as parameter groups. The paths are independent, because the
    rules are elementwise and gradients are not clipped.
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
    """The path of the rate with the lowest mean loss over the path, the fastest descent.

    Losses are capped at twice the loss of the start, so the distance of a diverged path does not
    affect the mean.
    """
    points = descend(surface, algorithm.name, RATES, steps, **algorithm.options)
    with np.errstate(all="ignore"):
        losses = np.asarray(surface.f(points[..., 0], points[..., 1])) - surface.lowest
        worst = 2 * losses[:, :1]
        capped = np.where(losses <= worst, losses, worst)
    best = int(capped.mean(1).argmin())
    return Path(surface.key, algorithm.key, RATES[best], points[best], losses[best])
