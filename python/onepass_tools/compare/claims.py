"""What the textbooks say of the algorithms, measured: each function returns its figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from onepass.training import make_optimizer
from onepass_tools.compare.algorithms import BY_KEY
from onepass_tools.compare.line_fit import run_algorithms
from onepass_tools.compare.surfaces import SURFACES, Array, best_path, descend

RAVINE = next(surface for surface in SURFACES if surface.key == "ravine")


def crossings(values: Array, tolerance: float = 0.01) -> int:
    """Changes of sign of a path around its goal at 0, those below ``tolerance`` of its start left
    out."""
    signs = np.sign(values[np.abs(values) > tolerance * abs(values[0])])
    return int((signs[1:] != signs[:-1]).sum())


def overshoot(values: Array) -> float:
    """How far a path goes beyond 0, as a share of its start's distance."""
    return float(max(0.0, (-values * np.sign(values[0])).max() / abs(values[0])))


def oscillation(experiment: dict[str, Any] | None = None) -> dict[str, dict[str, float]]:
    """Momentum and AdamW: the slope in the line's experiment, and the path across the ravine, each
    at its best rate and at one rate for both."""
    line = experiment or run_algorithms()
    found = {}
    for key in ("momentum", "adamw"):
        slope = np.array(line["runs"][key]["path"])[:, 0] - line["exact"][0]
        best = best_path(RAVINE, BY_KEY[key])
        # Above 0.038 momentum leaves the ravine: 2 (1 + 0.9) / 50 = 0.076 is its limit.
        same = descend(RAVINE, key, [0.01])[0]
        found[key] = {
            "line overshoot": overshoot(slope),
            "line crossings": crossings(slope),
            "ravine lr": best.lr,
            "ravine overshoot": overshoot(best.points[:, 1]),
            "ravine crossings": crossings(best.points[:, 1]),
            "ravine crossings at lr 0.01": crossings(same[:, 1]),
            "ravine loss at lr 0.01": float(RAVINE.f(*same[-1])),
        }
    return found


def step_sizes(key: str, steps: int = 2000, elements: int = 256) -> Array:
    """The rms over elements of each step over lr, [steps], where gradients are normal noise."""
    param = torch.nn.Parameter(torch.zeros(elements))
    optimizer = make_optimizer(key, [param], 1.0)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(steps):
        before = param.detach().clone()
        param.grad = torch.randn(elements, generator=generator)
        optimizer.step()
        sizes.append(float((param.detach() - before).square().mean().sqrt()))
    return np.array(sizes)


def step_decay() -> dict[str, float]:
    """The exponent p of a step's size ~ t^p over steps 500 to 2000: -1/2 dies out, 0 does not."""
    found = {}
    for key in ("adagrad", "rmsprop", "adamw"):
        size = step_sizes(key)[499:]
        t = np.arange(500, 500 + len(size))
        found[key] = float(np.polyfit(np.log(t), np.log(size), 1)[0])
    return found


def decay_kinds(steps: int = 200) -> dict[str, float]:
    """The share of a weight of 1 that decay of 0.1 has taken off, after 200 steps at lr 0.01.

    Gradients alternate between +g and -g, so that they move the weight by nothing on average; g is
    0.1 or 10. Decoupled decay takes the same off both. With L2 the decay passes through Adam's
    denominator, which g fills.
    """
    found = {}
    for key in ("adam", "adamw"):
        for size in (0.1, 10.0):
            weights = []
            for decay in (0.1, 0.0):
                param = torch.nn.Parameter(torch.ones(1))
                optimizer = make_optimizer(
                    key, [param], 0.01, weight_decay=decay, betas=(0.9, 0.999)
                )
                for step in range(steps):
                    param.grad = torch.full((1,), size if step % 2 else -size)
                    optimizer.step()
                weights.append(float(param.detach()))
            found[f"{key}, gradients of {size:g}"] = 1 - weights[0] / weights[1]
    return found


def lion_steps(steps: int = 200) -> tuple[float, float]:
    """The smallest and the largest step of any element over lr, for gradients of 1e-6 to 1e6."""
    scale = torch.logspace(-6, 6, 64)
    param = torch.nn.Parameter(torch.zeros(64))
    # A power of two: the weights are its multiples then, and exact.
    optimizer = make_optimizer("lion", [param], 2.0**-10)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(steps):
        before = param.detach().clone()
        param.grad = scale * torch.randn(64, generator=generator)
        optimizer.step()
        sizes.append((param.detach() - before).abs() * 2.0**10)
    every = torch.stack(sizes)
    return float(every.min()), float(every.max())


def cliff(max_grad_norm: float | None, lr: float = 0.1, steps: int = 300) -> list[float]:
    """The loss along plain SGD on a gentle slope that ends at a cliff (Pascanu et al. 2013).

    f(x, y) = 0.5 (x - 1)^2 + softplus(400 (0.5 - x)) + 0.5 y^2 from (0.45, 1): a wall of slope -400
    for x < 0.5, the minimum just beyond it.
    """
    point = torch.nn.Parameter(torch.tensor([0.45, 1.0]))
    optimizer = make_optimizer("sgd", [point], lr, max_grad_norm=max_grad_norm)
    losses = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        x, y = point
        wall = torch.nn.functional.softplus(400 * (0.5 - x))
        loss = 0.5 * (x - 1) ** 2 + wall + 0.5 * y**2
        losses.append(float(loss.detach()))
        if step < steps:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return losses


def furthest(losses: list[float]) -> float:
    """The largest loss after the first."""
    return max((loss for loss in losses[1:] if math.isfinite(loss)), default=math.inf)


def measure_claims(experiment: dict[str, Any] | None = None) -> dict[str, Any]:
    """All of them, as plain values."""
    low, high = lion_steps()
    return {
        "oscillation": oscillation(experiment),
        "step exponent": step_decay(),
        "decay taken": decay_kinds(),
        "lion steps over lr": {"smallest": low, "largest": high},
        "cliff": {
            name: {"first": run[0], "highest after it": furthest(run), "last": run[-1]}
            for name, run in (("not clipped", cliff(None)), ("clipped at 1", cliff(1.0)))
        },
    }
