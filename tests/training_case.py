"""A model and data for the tests of training."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import same_bits


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def data(count=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.sin(x[:, :3]) + 0.1 * torch.randn(count, 3, generator=generator)


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(same_bits(p, q) for p, q in pairs)
