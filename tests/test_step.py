"""Clipping, unscaling and skipping of steps, on every target."""

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
    same_bits,
    set_grads,
    snapshot,
    train,
)
from .support.comparison import params_of
from .support.targets import REFERENCE, compare, every_target, one_in, with_rows
from .support.thorough import THOROUGH

SLACK = 4 * torch.finfo(torch.float32).eps


def close(a, b):
    """Compares weights whose clip coefficients may differ by a few eps."""
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=SLACK, atol=0.02 * SLACK)


# --- clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@every_target
def test_clipping_agrees_with_torch(target, norm_type, case):
    one_in(3, target, CASES.index(case) + (norm_type == math.inf))
    options = last_variant(case, "fp32")
    ours = make_params(STEP_LIST, torch.float32, seed=1, device=target.device)
    theirs = clone(ours)
    options["backend"] = target.backend
    clipped = case.ours(ours, **options, max_grad_norm=0.5, norm_type=norm_type)
    plain = case.ours(theirs, **options)
    for step in range(4):
        set_grads(ours, torch.float32, seed=step)
        set_grads(theirs, torch.float32, seed=step)
        before = [p.grad.clone() for p in ours]
        clipped.step()
        # torch cannot compute the largest magnitude of an empty gradient.
        some = [p for p in theirs if p.numel()]
        norm = torch.nn.utils.clip_grad_norm_(some, 0.5, norm_type)
        plain.step()
        assert clipped.grad_norm.shape == ()
        assert clipped.grad_norm.dtype == torch.float32
        torch.testing.assert_close(clipped.grad_norm, norm, rtol=SLACK, atol=0)
        # The step does not change the gradients.
        assert all(same_bits(p.grad, g) for p, g in zip(ours, before, strict=True))
    # Rules that divide by the size of the gradient amplify a rounding difference of the coefficient
    # for elements near zero.
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=2e-6)


@every_target
def test_a_norm_below_the_limit_changes_no_bit(target):
    ours = make_params(STEP_LIST, torch.float32, seed=1, device=target.device)
    theirs = clone(ours)
    clipped = adamw(ours, backend=target.backend, max_grad_norm=1e9)
    plain = adamw(theirs, backend=target.backend)
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
    assert optimizer.grad_norm == 0  # torch.nn.utils.clip_grad_norm_ returns 0 too
    assert int(optimizer.skipped_steps) == 0


# --- skipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@every_target
def test_a_nonfinite_gradient_changes_no_bit(target, options, value):
    one_in(3, target, STEP_FORMATS.index(options) + math.isnan(value))
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    params = make_params(STEP_LIST, dtype, seed=1, device=target.device)
    optimizer = adamw(params, backend=target.backend, skip_nonfinite=True, **options)
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


@every_target
def test_skipped_first_step_has_no_effect(target):
    """The first momentum buffer of SGD equals the gradient, whatever the dampening."""
    make = {"lr": 0.02, "momentum": 0.9, "dampening": 0.25, "backend": target.backend}
    ours = make_params(STEP_LIST, torch.float32, seed=1, device=target.device)
    theirs = clone(ours)
    skipping = onepass.SGD(ours, **make, skip_nonfinite=True)
    plain = onepass.SGD(theirs, **make)
    set_grads(ours, torch.float32, seed=9)
    ours[0].grad[0] = math.inf
    skipping.step()
    ours[1].grad = None  # which also invalidates the plan
    skipping.step()
    train(skipping, ours, 3)
    train(plain, theirs, 3)
    assert_same(skipping, plain)


# --- whole steps -----------------------------------------------------------------------------

SETTINGS = {
    "clipped": ({"max_grad_norm": 3.0}, {}),
    "largest": ({"max_grad_norm": 3.0, "norm_type": math.inf, "skip_nonfinite": True}, {}),
    "zeroed": ({"skip_nonfinite": True, "zero_grads": True}, {}),
    "scaled": (
        {"max_grad_norm": 0.7, "skip_nonfinite": True},
        {"grad_scale": lambda i: torch.tensor(8.0)},
    ),
    "judged": (
        {"zero_grads": True},
        {
            "grad_scale": lambda i: torch.tensor(2.0**i),
            "found_inf": lambda i: torch.tensor(float(i % 2 == 0)),
        },
    ),
}
"""Name -> the options of the optimizer, and what a loss scaler sets before step i."""


def whole_steps(target, number, name):
    """The tensors of an optimizer after five steps, and the outputs of each step."""
    case, (options, settings) = CASES[number], SETTINGS[name]
    variant = {**next(case.variants()), **options, "states": "bf16"}
    if case.name == "sgd":
        variant.update(momentum=0.9, dampening=0.25)
    shapes = [(33,), (2085,), (4, 5)]
    params = make_params(shapes, torch.float32, seed=1, device=target.device)
    groups = [{"params": params[:1], "lr": torch.tensor(0.02)}, {"params": params[1:], "seed": 4}]
    optimizer = case.ours(groups, **variant, backend=target.backend, seed=3)
    found = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            # Integers, so the sum of their squares is exact in any order of addition.
            grad = torch.randint(-9, 10, param.shape, generator=generator).float()
            param.grad = grad.to(target.device)
        if "skip_nonfinite" in options and step in (0, 2):
            params[1].grad[100] = math.nan if step else math.inf
        for key, value in settings.items():
            setattr(optimizer, key, value(step).to(target.device))
        if step == 3:
            optimizer.param_groups[0]["lr"].fill_(0.1)
            optimizer.param_groups[1]["lr"] = 0.001
        optimizer.step()
        numbers = [optimizer.grad_norm, optimizer.skipped_steps, *(p.grad for p in params)]
        found += [torch.zeros(1) if n is None else n.float() for n in numbers]
    skipped = 2 if "skip_nonfinite" in options else 3 if "found_inf" in settings else 0
    assert float(optimizer.state[params[0]]["step"]) == 5 - skipped
    for param in params_of(optimizer):
        found += [param, *(v for v in optimizer.state[param].values())]
    return found


def whole_rows(target):
    """All combinations of rules and settings; for the interpreter, one setting per rule."""
    for i, case in enumerate(CASES):
        for j, name in enumerate(SETTINGS):
            if not target.interpreted or j == i % len(SETTINGS):
                yield f"{case.name}-{name}", (i, name)


@with_rows("number,name", whole_rows)
def test_whole_steps_match_the_reference(target, number, name):
    """If the first step is skipped, the second step initializes the momentum of SGD."""
    compare(target, whole_steps, number, name)


# --- torch.amp.GradScaler --------------------------------------------------------------------


class _Loop:
    """Loss scaling in plain Python, the oracle: unscale, check, step or skip, update the scale."""

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


@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, onepass.GradScaler])
@every_target
def test_many_steps_with_a_scaler_and_infinities_equal_an_oracle_loop(target, scaler_of):
    steps = 100 if THOROUGH and not target.interpreted else 30
    ours = make_params([(33,), (4, 5), ()], torch.float32, seed=1, device=target.device)
    theirs = clone(ours)
    scaled = adamw(ours, backend=target.backend, fused=scaler_of is torch.amp.GradScaler)
    # The same target, or the cpu backend, which is faster.
    other = target.backend if target.device == "cuda" or target == REFERENCE else "cpu"
    plain = adamw(theirs, backend=other)
    scaler = scaler_of(target.device, init_scale=1024.0, growth_interval=7)
    oracle = _Loop(1024.0, 7)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        scale = float(scaler.scale(torch.ones((), device=target.device)))
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


@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, onepass.GradScaler])
@pytest.mark.parametrize("unscales", [False, True])
@every_target
def test_scaling_with_clipping_and_fp16_gradients(target, scaler_of, unscales):
    dtype = torch.float32 if unscales else torch.float16  # torch refuses to unscale fp16 gradients
    ours = make_params(STEP_LIST, torch.float32, seed=1, device=target.device)
    theirs = clone(ours)
    fused = scaler_of is torch.amp.GradScaler
    scaled = adamw(ours, backend=target.backend, max_grad_norm=0.5, fused=fused)
    plain = adamw(theirs, backend=target.backend)
    scaler = scaler_of(target.device, init_scale=64.0)
    for step in range(3):
        for params in (ours, theirs):
            set_grads(params, dtype, seed=step)
        for p in theirs:
            p.grad_dtype = None
            p.grad = p.grad.float() / 64.0
        scaler.scale(torch.ones((), device=target.device))
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
