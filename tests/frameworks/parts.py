"""A small model, its data, and helpers that the framework tests share."""

import pytest
import torch

import onepass

BUILT = [
    pytest.param(onepass.AdamW, {}, id="fp32"),
    pytest.param(onepass.AdamW, {"states": "mx8"}, id="mx8"),
    pytest.param(onepass.SGD, {"momentum": 0.9}, id="sgd"),
]
"""Classes and options that each framework is tested with."""


def small_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def weights(model):
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    """Whether two lists of tensors have the same bits."""
    return all(map(torch.equal, one, other))


def losing(values, at):
    """Registers a hook that makes the gradient infinite at one step, counted from 0."""
    step = 0

    def hook(gradient):
        nonlocal step
        step += 1
        return torch.full_like(gradient, float("inf")) if step == at + 1 else gradient

    return values.register_hook(hook)
