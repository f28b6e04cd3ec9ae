"""What may come between gradients and the rule, and ride in the sweep, on every backend that runs
here: clipping, unscaling, skipping; zeroing, averages, telemetry."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import onepass
from onepass.engine import backends

from .cases import (
    CASES,
    STEP_FORMATS,
    STEP_LIST,
    adamw,
    assert_same,
    clone,
    last_variant,
    make_params,
    runs_here,
    same_bits,
    set_grads,
    snapshot,
    train,
)

NAMES = runs_here()
RUNS = [pytest.param(name, id=name) for name in NAMES]
SLACK = 4 * torch.finfo(torch.float32).eps


def close(a, b):
    """Weights that differ as an update differs whose clip coefficient is a few eps off."""
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=SLACK, atol=0.02 * SLACK)


# --- clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clipping_agrees_with_torch(name, norm_type, case):
    options = last_variant(case, "fp32")
    ours = make_params(STEP_LIST, torch.float32, seed=1)
    theirs = clone(ours)
    clipped = case.ours(ours, **options, backend=name, max_grad_norm=0.5, norm_type=norm_type)
    plain = case.ours(theirs, **options, backend=name)
    for step in range(4):
        set_grads(ours, torch.float32, seed=step)
        set_grads(theirs, torch.float32, seed=step)
        before = [p.grad.clone() for p in ours]
        clipped.step()
        # Of nothing, torch has no largest magnitude.
        some = [p for p in theirs if p.numel()]
        norm = torch.nn.utils.clip_grad_norm_(some, 0.5, norm_type)
        plain.step()
        assert clipped.grad_norm.shape == ()
        assert clipped.grad_norm.dtype == torch.float32
        torch.testing.assert_close(clipped.grad_norm, norm, rtol=SLACK, atol=0)
        # Gradients are only read.
        assert all(same_bits(p.grad, g) for p, g in zip(ours, before, strict=True))
    # Rules that divide by the gradient's own size amplify the coefficient's last bit near zero.
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_norm_below_the_limit_changes_no_bit(name):
    ours = make_params(STEP_LIST, torch.float32, seed=1)
    theirs = clone(ours)
    clipped = adamw(ours, backend=name, max_grad_norm=1e9)
    plain = adamw(theirs, backend=name)
    train(clipped, ours, 3)
    train(plain, theirs, 3)
    assert_same(clipped, plain)


def test_grad_norm_is_a_new_tensor_at_every_step():
    params = make_params(STEP_LIST, torch.float32, seed=1)
    optimizer = adamw(params, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    set_grads(params, torch.float32, seed=0)
    optimizer.step()
    first = optimizer.grad_norm
    kept = first.clone()
    set_grads(params, torch.float32, seed=1)
    optimizer.step()
    assert torch.equal(first, kept)
    assert not torch.equal(first, optimizer.grad_norm)


def test_settings_may_change_between_steps_and_are_copied():
    params = make_params(STEP_LIST, torch.float32, seed=1)
    optimizer = adamw(params)
    train(optimizer, params, 1)
    optimizer.max_grad_norm = 0.1
    train(optimizer, params, 1, start=1)
    assert optimizer.verdict[0] < 1
    assert copy.deepcopy(optimizer).max_grad_norm == 0.1
    assert pickle.loads(pickle.dumps(optimizer)).max_grad_norm == 0.1
    optimizer.max_grad_norm = -1
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="max_grad_norm"):
        train(optimizer, params, 1, start=2)
    assert all(map(same_bits, before, snapshot(optimizer)))


def test_no_gradients_at_all():
    optimizer = adamw(make_params(STEP_LIST, torch.float32, seed=1), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0  # as torch.nn.utils.clip_grad_norm_ returns
    assert int(optimizer.skipped_steps) == 0


# --- skipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_nonfinite_gradient_changes_no_bit(name, options, value):
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    params = make_params(STEP_LIST, dtype, seed=1)
    optimizer = adamw(params, backend=name, skip_nonfinite=True, **options)
    set_grads(params, dtype, seed=0)
    optimizer.step()
    before = snapshot(optimizer)
    set_grads(params, dtype, seed=1)
    params[2].grad[1, 3] = value
    optimizer.step()
    assert all(map(same_bits, before, snapshot(optimizer)))
    assert int(optimizer.skipped_steps) == 1
    set_grads(params, dtype, seed=2)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert float(optimizer.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("name", RUNS)
def test_a_skipped_first_step_is_as_if_it_had_not_been(name):
    """SGD's first buffer is the gradient itself, whatever dampening is."""
    make = {"lr": 0.02, "momentum": 0.9, "dampening": 0.25, "backend": name}
    ours = make_params(STEP_LIST, torch.float32, seed=1)
    theirs = clone(ours)
    skipping = onepass.SGD(ours, **make, skip_nonfinite=True)
    plain = onepass.SGD(theirs, **make)
    set_grads(ours, torch.float32, seed=9)
    ours[0].grad[0] = math.inf
    skipping.step()
    ours[1].grad = None  # and the plan is made anew in between
    skipping.step()
    train(skipping, ours, 3)
    train(plain, theirs, 3)
    assert_same(skipping, plain)


# --- torch.amp.GradScaler --------------------------------------------------------------------


class _Loop:
    """Loss scaling by hand, the oracle: unscale, look, step or leave alone, halve or double."""

    def __init__(self, scale, interval):
        self.scale, self.interval, self.good = scale, interval, 0

    def step(self, optimizer, params):
        finite = all(bool(p.grad.isfinite().all()) for p in params)
        if finite:
            for p in params:
                p.grad = p.grad / self.scale
            optimizer.step()
            self.good += 1
            if self.good == self.interval:
                self.scale, self.good = self.scale * 2.0, 0
        else:
            self.scale, self.good = self.scale * 0.5, 0


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, onepass.GradScaler])
def test_many_steps_with_a_scaler_and_infinities_equal_an_oracle_loop(name, scaler_of):
    # Triton is interpreted here, a step takes a tenth of a second.
    steps = 60 if name == "triton" else 200
    ours = make_params([(33,), (4, 5), ()], torch.float32, seed=1)
    theirs = clone(ours)
    scaled = adamw(ours, backend=name, fused=scaler_of is torch.amp.GradScaler)
    plain = adamw(theirs, backend="reference" if name == "reference" else "cpu")
    scaler = scaler_of("cpu", init_scale=1024.0, growth_interval=7)
    oracle = _Loop(1024.0, 7)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        scale = float(scaler.scale(torch.ones(())))
        assert scale == oracle.scale
        for params in (ours, theirs):
            set_grads(params, torch.float32, seed=step)
            for p in params:
                p.grad = p.grad * scale
        if torch.rand((), generator=generator) < 0.2:
            place = int(torch.randint(33, (), generator=generator))
            for params in (ours, theirs):
                params[0].grad[place] = math.inf if step % 2 else math.nan
        scaler.step(scaled)
        scaler.update()
        oracle.step(plain, theirs)
    assert_same(scaled, plain)
    skipped = steps - int(scaled.state[ours[0]]["step"])
    assert steps / 10 < skipped < steps * 0.3
    assert int(scaled.skipped_steps) == skipped
    assert not hasattr(scaled, "grad_scale")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, onepass.GradScaler])
@pytest.mark.parametrize("unscales", [False, True])
def test_scaling_with_clipping_and_fp16_gradients(name, scaler_of, unscales):
    dtype = torch.float32 if unscales else torch.float16  # torch unscales no fp16 gradients
    ours = make_params(STEP_LIST, torch.float32, seed=1)
    theirs = clone(ours)
    fused = scaler_of is torch.amp.GradScaler
    scaled = adamw(ours, backend=name, max_grad_norm=0.5, fused=fused)
    plain = adamw(theirs, backend=name)
    scaler = scaler_of("cpu", init_scale=64.0)
    for step in range(3):
        for params in (ours, theirs):
            set_grads(params, dtype, seed=step)
        for p in theirs:
            p.grad_dtype = None
            p.grad = p.grad.float() / 64.0
        scaler.scale(torch.ones(()))
        if unscales:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        plain.step()
        torch.testing.assert_close(scaled.grad_norm, norm, rtol=SLACK, atol=0)
    close(ours, theirs)


def test_our_scaler_reads_gradients_twice_and_writes_none(monkeypatch):
    params = make_params([(33,)], torch.float32, seed=1)
    optimizer = adamw(params, max_grad_norm=1.0)
    scaler = onepass.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_grads(params, torch.float32, seed=0)
    before = params[0].grad.clone()
    passes = []
    cpu = backends.BACKENDS["cpu"]
    for method in ("norm", "run"):
        inner = getattr(cpu, method)
        monkeypatch.setattr(
            cpu, method, lambda *a, m=method, f=inner: (passes.append(m), f(*a))[1], raising=True
        )
    monkeypatch.setattr(
        torch, "_amp_foreach_non_finite_check_and_unscale_", lambda *a: passes.append("torch's")
    )
    scaler.step(optimizer)
    assert passes == ["norm", "run"]
    assert same_bits(params[0].grad, before)


def test_our_scaler_serves_other_optimizers():
    params = make_params([(33,)], torch.float32, seed=1)
    optimizer = torch.optim.AdamW(params)
    scaler = onepass.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_grads(params, torch.float32, seed=0)
    scaler.step(optimizer)
    scaler.update()
    assert float(optimizer.state[params[0]]["step"]) == 1
