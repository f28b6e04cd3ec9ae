"""Embeddings whose gradients have zero rows, on each device."""

from __future__ import annotations

import pytest
import torch

import onepass

from .cases import DTYPES
from .support.devices import Pair, each_target

FP32, BF16, _ = DTYPES
ROWS = [
    (FP32, {}),
    (BF16, {"states": "mx8", "weights": "split8"}),
    (BF16, {"states": "mx4", "weights": "stochastic"}),
]


@each_target
@pytest.mark.parametrize("cls", [onepass.AdamW, onepass.Lion], ids=["adamw", "lion"])
@pytest.mark.parametrize(("dtype", "options"), ROWS, ids=["fp32", "mx8-split8", "mx4-stochastic"])
def test_an_embedding_whose_rows_mostly_have_no_gradient(device, backend, dtype, options, cls):
    """Seven of eight rows of the gradient are zero in each step.

    Rows of two eighths have a gradient in every second step, so their states decay in between. The
    other rows never have a gradient.
    """
    pair = Pair(device, backend, dtype=dtype, shapes=[(512, 64)], cls=cls, **options)
    for step in range(4):
        pair.set_grads(step)
        for params in (pair.params, pair.twins):
            kept = torch.arange(512) % 8 == step % 2
            params[0].grad.mul_(kept[:, None].to(params[0].grad))
        pair.ours.step()
        pair.reference.step()
        pair.assert_same()
    assert not pair.params[0].grad[2::8].any()


@each_target
def test_an_embedding_with_all_its_gradients_zero(device, backend):
    """All gradients are zero from the first step on; blocks of zeros need a valid scale too."""
    for dtype, options in ROWS:
        pair = Pair(device, backend, dtype=dtype, shapes=[(512, 64)], **options)
        for _ in range(3):
            for p in (*pair.params, *pair.twins):
                p.grad = torch.zeros_like(p)
            pair.ours.step()
            pair.reference.step()
        pair.assert_same()
