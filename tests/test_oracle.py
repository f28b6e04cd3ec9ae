"""Errors against float64: one step in eps of the dtype, 100 steps relative to the update."""

from __future__ import annotations

import inspect

import pytest
import torch

import onepass

from .cases import VARIANTS, make_params
from .oracle import Oracle
from .support.thorough import THOROUGH

TWINS = [
    (case, variant, name)
    for case, variant, name in VARIANTS
    if case.torch is not None
    and not variant.get("eps_in_sqrt")
    and not variant.get("cautious_weight_decay")
    and variant["decoupled_weight_decay"] == (case.name == "adamw")
]
TWIN_IDS = [name for _, _, name in TWINS]


def torch_twin(case, variant, params):
    known = inspect.signature(case.torch).parameters
    return case.torch(
        params, **{k: v for k, v in variant.items() if k in known and k != "decoupled_weight_decay"}
    )


@pytest.mark.parametrize(("case", "variant", "name"), TWINS, ids=TWIN_IDS)
def test_the_oracle_is_torch_optim_in_float64(case, variant, name):
    param = torch.nn.Parameter(torch.randn(257, dtype=torch.float64))
    oracle = Oracle(case.name, param, variant, case.direction)
    optimizer = torch_twin(case, variant, [param])
    for seed in range(20):
        param.grad = torch.randn(
            257, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        oracle.step(param.grad)
        optimizer.step()
    # The centered variance is a difference of nearly equal numbers.
    limit = 1e-9 if variant.get("centered") else 1e-13
    torch.testing.assert_close(param.detach(), oracle.p, rtol=limit, atol=limit)


# In eps of the weight's dtype, relative to the weight or its change, whichever is larger. Rounding
# the weight itself takes half an eps.
ONE_STEP = {torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}


# `make test` runs every variant in fp32 and in one of the two other dtypes.
ONE_STEPS = [
    pytest.param(case, variant, dtype, id=f"{dtype}-{name}")
    for j, dtype in enumerate(ONE_STEP)
    for i, (case, variant, name) in enumerate(VARIANTS)
    if THOROUGH or j == 0 or (i + i // 2 + j) % 2  # with each value of the last two options
]


@pytest.mark.parametrize(("case", "variant", "dtype"), ONE_STEPS)
def test_one_step(case, variant, dtype):
    """Tests new states and states after steps; weights are 1 to 2 and steps are below 1.

    Where a gradient and coupled weight decay cancel, the rounding error of their sum is divided by
    its size, which no bound covers. The two have the same sign here.
    """
    generator = torch.Generator().manual_seed(5)

    def draw(low, high, shape):
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        size = low + (high - low) * torch.rand(shape, generator=generator)
        return (sign * size).to(dtype)

    params = [torch.nn.Parameter(draw(1, 2, shape)) for shape in ((1031,), (16, 33))]
    optimizer = case.ours(params, **variant)
    for step in range(6):
        oracles = []
        for param in params:
            param.grad = draw(0.1, 2, param.shape)
            if not variant["decoupled_weight_decay"]:
                sign = -1 if variant["maximize"] else 1
                param.grad = sign * param.grad.abs() * param.detach().sign()
            oracle = Oracle(case.name, param, variant, case.direction)
            state = optimizer.state.get(param, {})
            oracle.t = int(state.get("step", 0))
            oracle.s = {k: v.double().clone() for k, v in state.items() if k != "step"}
            oracle.step(param.grad)
            oracles.append((oracle, param.detach().double().clone()))
        optimizer.step()
        for param, (oracle, before) in zip(params, oracles, strict=True):
            change = (oracle.p - before).abs()
            size = torch.maximum(torch.maximum(before.abs(), oracle.p.abs()), change)
            error = (param.detach().double() - oracle.p).abs() / (size * torch.finfo(dtype).eps)
            assert error.max() <= ONE_STEP[dtype], f"step {step}: {error.max():.2f} eps"


@pytest.mark.parametrize(("case", "variant", "name"), TWINS, ids=TWIN_IDS)
def test_hundred_steps(case, variant, name):
    """The relative error after 100 steps is at most 1.1 times that of torch.optim, or 1e-6."""
    ours = make_params([(1031,), (16, 33)], torch.float32, seed=5)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().double().clone() for p in ours]
    oracles = [Oracle(case.name, p, variant, case.direction) for p in ours]
    optimizers = [case.ours(ours, **variant), torch_twin(case, variant, theirs)]
    for step in range(100):
        for i, (p, q, oracle) in enumerate(zip(ours, theirs, oracles, strict=True)):
            generator = torch.Generator().manual_seed(1000 * i + step)
            p.grad = torch.randn(p.shape, generator=generator) + 0.1
            q.grad = p.grad
            oracle.step(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, oracle, before in zip(ours, theirs, oracles, start, strict=True):
        update = (oracle.p - before).square().mean().sqrt()
        error, theirs_error = (
            ((x.detach().double() - oracle.p).square().mean().sqrt() / update).item()
            for x in (p, q)
        )
        # 1e-6 is 8 eps. A beta rounded to fp32 is off by 3e-8, times the 10 to 100 steps that an
        # average covers here.
        assert error <= max(1.1 * theirs_error, 1e-6), (
            f"{error:.1e}, torch.optim {theirs_error:.1e}"
        )


def test_lion_against_its_pseudo_code_where_the_sign_decides():
    """sign(0) is 0, so a weight whose gradients are all zero only decays."""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = onepass.Lion([param], lr=0.1, betas=(0.5, 0.5), weight_decay=0.0)
    param.grad = torch.tensor([1.0, 0.0, -1.0])
    optimizer.step()
    assert param.tolist() == pytest.approx([0.9, -2.0, 3.1])
    # The average 0.5 and this gradient -0.5 cancel exactly.
    param.grad = torch.tensor([-0.5, 0.0, 0.5])
    optimizer.step()
    assert param.tolist() == pytest.approx([0.9, -2.0, 3.1])
    # The average is 0, and so is this gradient.
    param.grad = torch.zeros(3)
    optimizer.step()
    assert param.tolist() == pytest.approx([0.9, -2.0, 3.1])
