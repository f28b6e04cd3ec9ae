"""Rules and formats that no benchmark measures, and rows of zero gradients, on each device."""

from __future__ import annotations

import pytest
import torch

import onepass

from .cases import CASES, DTYPES, last_variant, make_params, set_grads
from .support.devices import CHUNK, Pair, assert_same_as_cpu, copy_grads, each_target, place

FP32, BF16, FP16 = DTYPES
STORED = [
    (FP32, "native"),
    (BF16, "stochastic"),
    (BF16, "kahan"),
    (BF16, "master"),
    (BF16, "split8"),
    (FP16, "native"),
    (FP16, "stochastic"),
    (FP16, "kahan"),
    (FP16, "master"),
]
SIZES = [(33,), (), (2 * CHUNK + 2085,)]


@each_target
@pytest.mark.parametrize("states", ["mx8", "mx4"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_rule_in_one_launch_of_weights_in_every_format(device, backend, case, states):
    """A long parameter is several chunks. The gradients' dtypes change with the format."""
    variant = last_variant(case, states)
    groups, twin_groups, lists = [], [], []
    every = 3 if device == "cuda" else len(STORED)  # format whose list has a long parameter
    for i, (dtype, weights) in enumerate(STORED):
        sizes = SIZES if (i - CASES.index(case)) % every == 0 else SIZES[:2]
        twins = make_params(sizes, dtype, seed=i)
        params = place(twins, device)
        groups.append({"params": params, "weights": weights})
        twin_groups.append({"params": twins, "weights": weights})
        lists.append((params, twins, DTYPES[i % 3]))
    options = {**variant, "states": states, "seed": 7}
    ours = case.ours(groups, **options, backend=backend)
    reference = case.ours(twin_groups, **options, backend="reference")
    for step in range(2):
        for i, (params, twins, dtype) in enumerate(lists):
            set_grads(twins, dtype, seed=100 * step + i)
            copy_grads(params, twins)
        ours.step()
        reference.step()
    assert_same_as_cpu(ours, reference)


@each_target
@pytest.mark.parametrize("states", ["mx8", "mx4", "dynamic8"])
@pytest.mark.parametrize(("dtype", "weights"), [(BF16, "master"), (FP16, "kahan")])
def test_a_list_of_one_format(device, backend, states, dtype, weights):
    """Lists of one format have kernels of their own."""
    shapes = [(33,), (CHUNK,), (CHUNK + 1,)]
    pair = Pair(device, backend, dtype=dtype, shapes=shapes, states=states, weights=weights)
    for step in range(2):
        pair.step(step)
    pair.assert_same()


ROWS = [
    (FP32, {}),
    (BF16, {"states": "mx8", "weights": "split8"}),
    (BF16, {"states": "mx4", "weights": "stochastic"}),
]


@each_target
@pytest.mark.parametrize("cls", [onepass.AdamW, onepass.Lion], ids=["adamw", "lion"])
@pytest.mark.parametrize(("dtype", "options"), ROWS, ids=["fp32", "mx8-split8", "mx4-stochastic"])
def test_an_embedding_whose_rows_mostly_have_no_gradient(device, backend, dtype, options, cls):
    """Seven rows of eight are zeros. Rows of two eighths have a gradient in every other step: their
    states decay and come back. The others never have one."""
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
    """From the first step on: blocks of zeros have a scale too."""
    for dtype, options in ROWS:
        pair = Pair(device, backend, dtype=dtype, shapes=[(512, 64)], **options)
        for _ in range(3):
            for p in (*pair.params, *pair.twins):
                p.grad = torch.zeros_like(p)
            pair.ours.step()
            pair.reference.step()
        pair.assert_same()
