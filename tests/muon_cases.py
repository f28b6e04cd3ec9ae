"""Matrices, groups and an oracle for the tests of Muon."""

from __future__ import annotations

import torch

from onepass.muon.coefficients import NEWTON_SCHULZ

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (33, 17), (2, 5, 7), (4, 3, 3, 3), (1, 1), (0, 4)]
REST = [(33,), (), (5, 7)]


def matrices(seed=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def both_groups(params, rest, **adamw):
    return [{"params": params}, {"params": rest, "use_muon": False, **adamw}]


def newton_schulz(u, triples=(NEWTON_SCHULZ,) * 5, eps=1e-7):
    """The iteration in float64, on one matrix."""
    x = u.double()
    x = x / max(x.norm().item(), eps)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def error(found, expected):
    """The relative Frobenius error."""
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()
