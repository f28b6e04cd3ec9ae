"""Measurements that test textbook claims about the algorithms; each function returns figures."""

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
    """The number of sign changes of a path around its goal at 0.

    Values below ``tolerance`` times the magnitude of the start are ignored.
    """
    signs = np.sign(values[np.abs(values) > tolerance * abs(values[0])])
    return int((signs[1:] != signs[:-1]).sum())


def overshoot(values: Array) -> float:
    """The largest distance of a path beyond 0, as a fraction of the distance of its start."""
    return float(max(0.0, (-values * np.sign(values[0])).max() / abs(values[0])))


def oscillation(experiment: dict[str, Any] | None = None) -> dict[str, dict[str, float]]:
    """Overshoot and crossings of momentum and AdamW.

    They are measured on the slope in the line experiment, and on the path across the ravine at the
    best rate of each algorithm and at one common rate.
    """
    line = experiment or run_algorithms()
    found = {}
    for key in ("momentum", "adamw"):
        slope = np.array(line["runs"][key]["path"])[:, 0] - line["exact"][0]
        best = best_path(RAVINE, BY_KEY[key])
        # Momentum leaves the ravine above lr 0.038; its limit is 2 (1 + 0.9) / 50 = 0.076.
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
    """The RMS over elements of step / lr for each step, [steps], with normal noise as gradients."""
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
    """The exponent p of step size ~ t^p, from steps 500 to 2000: -1/2 decays, 0 stays constant."""
    found = {}
    for key in ("adagrad", "rmsprop", "adamw"):
        size = step_sizes(key)[499:]
        t = np.arange(500, 500 + len(size))
        found[key] = float(np.polyfit(np.log(t), np.log(size), 1)[0])
    return found


def decay_kinds(steps: int = 200) -> dict[str, float]:
    """The fraction of a weight of 1 that decay 0.1 removes in 200 steps at lr 0.01.

    Gradients alternate between +g and -g with g = 0.1 or 10, so their mean effect on the weight is
    zero. Decoupled decay removes the same fraction for both g. L2 decay is part of the gradient, so
    Adam divides it by a denominator that g dominates.
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
    """Returns the smallest and largest step / lr of any element, for gradients of 1e-6 to 1e6."""
    scale = torch.logspace(-6, 6, 64)
    param = torch.nn.Parameter(torch.zeros(64))
    # With a power of two as lr, all weights are multiples of lr and therefore exact.
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
    """The losses of plain SGD on a gentle slope that ends at a cliff (Pascanu et al. 2013).

    f(x, y) = 0.5 (x - 1)^2 + softplus(400 (0.5 - x)) + 0.5 y^2, starting at (0.45, 1). There is a
    wall with slope -400 for x < 0.5, and the minimum is beyond the wall.
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
    """The largest finite loss after the first; infinite if there is none."""
    return max((loss for loss in losses[1:] if math.isfinite(loss)), default=math.inf)


def measure_claims(experiment: dict[str, Any] | None = None) -> dict[str, Any]:
    """All measurements as plain values."""
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
