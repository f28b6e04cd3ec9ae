"""What may come between gradients and the rule, and ride in the sweep, on every backend that runs
here: clipping, unscaling, skipping; zeroing, averages, telemetry."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import onepass
from onepass import backends

from .cases import CASES, assert_same, clone, last_variant, make_params, same_bits, set_grads, train

CPU = torch.device("cpu")
NAMES = [name for name, b in backends.BACKENDS.items() if not b.unavailable(CPU)]
RUNS = [pytest.param(name, id=name) for name in NAMES]
LIST = [(33,), (), (4, 5), (0,), (257,)]
SLACK = 4 * torch.finfo(torch.float32).eps


def adamw(params, **options):
    return onepass.AdamW(params, lr=0.02, weight_decay=0.1, **options)


def snapshot(optimizer):
    """Bits of all that a skipped step must leave alone."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    held = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in (*params, *held)]


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
    ours = make_params(LIST, torch.float32, seed=1)
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
    ours = make_params(LIST, torch.float32, seed=1)
    theirs = clone(ours)
    clipped = adamw(ours, backend=name, max_grad_norm=1e9)
    plain = adamw(theirs, backend=name)
    train(clipped, ours, 3)
    train(plain, theirs, 3)
    assert_same(clipped, plain)


def test_grad_norm_is_a_new_tensor_at_every_step():
    params = make_params(LIST, torch.float32, seed=1)
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
    params = make_params(LIST, torch.float32, seed=1)
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
    optimizer = adamw(make_params(LIST, torch.float32, seed=1), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is None
    assert int(optimizer.skipped_steps) == 0


# --- skipping --------------------------------------------------------------------------------

FORMATS = [
    {},
    {"states": "bf16"},
    {"states": "mx8"},
    {"states": "mx4", "weights": "stochastic"},
    {"states": "mx8", "weights": "split8"},
    {"weights": "kahan"},
    {"weights": "master", "ema_decay": 0.9},
]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_nonfinite_gradient_changes_no_bit(name, options, value):
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    params = make_params(LIST, dtype, seed=1)
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
    ours = make_params(LIST, torch.float32, seed=1)
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
def test_200_steps_with_a_scaler_and_infinities_equal_an_oracle_loop(name, scaler_of):
    ours = make_params([(33,), (4, 5), ()], torch.float32, seed=1)
    theirs = clone(ours)
    scaled = adamw(ours, backend=name)
    plain = adamw(theirs, backend="reference" if name == "reference" else "cpu")
    scaler = scaler_of("cpu", init_scale=1024.0, growth_interval=7)
    oracle = _Loop(1024.0, 7)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
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
    skipped = 200 - int(scaled.state[ours[0]]["step"])
    assert 20 < skipped < 60
    assert int(scaled.skipped_steps) == skipped
    assert not hasattr(scaled, "grad_scale")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, onepass.GradScaler])
@pytest.mark.parametrize("unscales", [False, True])
def test_scaling_with_clipping_and_fp16_gradients(name, scaler_of, unscales):
    dtype = torch.float32 if unscales else torch.float16  # torch unscales no fp16 gradients
    ours = make_params(LIST, torch.float32, seed=1)
    theirs = clone(ours)
    scaled = adamw(ours, backend=name, max_grad_norm=0.5)
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


# --- in the same sweep -----------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeroed_gradients_and_the_same_bits(name, dtype):
    ours = make_params(LIST, dtype, seed=1)
    theirs = clone(ours)
    zeroing = adamw(ours, backend=name, zero_grads=True, skip_nonfinite=True)
    plain = adamw(theirs, backend=name)
    for step in range(2):
        for params in (ours, theirs):
            set_grads(params, dtype, seed=step)
        ours[2].grad = ours[2].grad.t().contiguous().t()  # in another order than the weight
        at = [p.grad.data_ptr() for p in ours]
        zeroing.step()
        plain.step()
        assert [p.grad.data_ptr() for p in ours] == at
        assert all(same_bits(p.grad, torch.zeros_like(p)) for p in ours)
    assert_same(zeroing, plain)
    ours[0].grad.fill_(math.nan)
    zeroing.step()
    assert int(zeroing.skipped_steps) == 1
    assert not ours[0].grad.any()


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
def test_averages_are_the_bits_of_the_reference_and_change_no_others(name, options):
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    options = {**options, "ema_decay": 0.75}
    results = []
    for backend in (name, "reference"):
        params = make_params(LIST, dtype, seed=1)
        optimizer = adamw(params, backend=backend, **options)
        train(optimizer, params, 3)
        results.append(optimizer)
    assert_same(*results)
    params = make_params(LIST, dtype, seed=1)
    plain = adamw(params, backend=name, **{**options, "ema_decay": None})
    train(plain, params, 3)
    for p, q in zip(params, results[0].param_groups[0]["params"], strict=True):
        assert same_bits(p.detach(), q.detach())


def test_an_average_is_what_its_formula_says_and_starts_at_the_weight():
    params = make_params(LIST, torch.float32, seed=1)
    optimizer = adamw(params, ema_decay=0.75)
    expected = [p.detach().double() for p in params]
    for step in range(5):
        set_grads(params, torch.float32, seed=step)
        optimizer.step()
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, params, strict=True)]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], e.float(), rtol=1e-6, atol=1e-6)


def test_averages_are_swapped_in_and_out():
    params = make_params(LIST, torch.bfloat16, seed=1)
    optimizer = adamw(params, ema_decay=0.5, weights="split16")
    with (
        pytest.raises(RuntimeError, match="no weight has an average"),
        optimizer.averaged_weights(),
    ):
        pass
    train(optimizer, params, 3)
    before, at = snapshot(optimizer), [p.data_ptr() for p in params]
    with optimizer.averaged_weights():
        for p in params:
            assert torch.equal(p.detach(), optimizer.state[p]["ema"].bfloat16())
        with pytest.raises(RuntimeError, match=r"leave averaged_weights\(\)"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="leave"), optimizer.averaged_weights():
            pass
    assert all(map(same_bits, before, snapshot(optimizer)))
    assert [p.data_ptr() for p in params] == at
    with pytest.raises(KeyError), optimizer.averaged_weights():
        raise KeyError
    assert all(map(same_bits, before, snapshot(optimizer)))
    optimizer.step()


def test_averages_are_saved_and_loaded():
    params = make_params(LIST, torch.float32, seed=1)
    whole = clone(params)
    optimizer, uninterrupted = (adamw(p, ema_decay=0.9) for p in (params, whole))
    train(uninterrupted, whole, 6)
    train(optimizer, params, 3)
    resumed = clone(params)
    second = adamw(resumed, ema_decay=0.9)
    second.load_state_dict(optimizer.state_dict())
    train(second, resumed, 3, start=3)
    assert_same(second, uninterrupted)
    # One that keeps no average takes the rest.
    none = adamw(clone(params))
    none.load_state_dict(optimizer.state_dict())
    assert all("ema" not in state for state in none.state.values())
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ema of parameter 0 .* is \(3,\)"):
        adamw(clone(params), ema_decay=0.9).load_state_dict(saved)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_telemetry(name, dtype):
    """Sums of up to 300 squares: each backend adds in its own order, in fp32 at the least."""
    params = make_params(LIST, dtype, seed=1)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    options = {"weights": "master"} if dtype == torch.bfloat16 else {}
    optimizer = onepass.AdamW(
        groups, lr=0.02, backend=name, telemetry=True, max_grad_norm=0.1, **options
    )
    with pytest.raises(RuntimeError, match="telemetry"):
        optimizer.telemetry  # noqa: B018
    set_grads(params, dtype, seed=0)
    optimizer.step()
    set_grads(params, dtype, seed=1)

    def full(p):
        return optimizer.state[p].get("weight_master", p).detach().double()

    before = [full(p).clone() for p in params]
    params[0].grad[3] = 0
    optimizer.step()
    after = [full(p) for p in params]
    found = optimizer.telemetry
    assert len(found) == 2
    for group, numbers in zip(((0, 1), (2, 3, 4)), found, strict=True):
        expected = {
            "grad_norm": [params[i].grad.double() for i in group],
            "weight_norm": [after[i] for i in group],
            "update_norm": [after[i] - before[i] for i in group],
        }
        for key, values in expected.items():
            norm = torch.cat([v.flatten() for v in values]).norm()
            torch.testing.assert_close(numbers[key], norm, rtol=2e-5, atol=0)
        assert int(numbers["nonfinite"]) == 0


@pytest.mark.parametrize("name", RUNS)
def test_telemetry_of_a_skipped_step_counts_what_was_wrong(name):
    params = make_params([(33,), (300,)], torch.float32, seed=1)
    optimizer = adamw(params, backend=name, telemetry=True, skip_nonfinite=True)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    params[0].grad[5], params[1].grad[299] = math.nan, math.inf
    optimizer.step()
    assert all(map(same_bits, before, snapshot(optimizer)))
    (found,) = optimizer.telemetry
    assert int(found["nonfinite"]) == 2
    assert float(found["update_norm"]) == 0
    norm = torch.cat([p.detach().double() for p in params]).norm()
    torch.testing.assert_close(found["weight_norm"], norm, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_telemetry_is_the_same_run_after_run(name):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = make_params([(100_000,), (33,)] if name == "cpu" else LIST, torch.float32, seed=1)
        optimizer = adamw(params, backend=name, telemetry=True)
        train(optimizer, params, 1)
        found.append(optimizer.telemetry[0])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
