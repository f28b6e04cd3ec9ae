"""What may ride in the sweep, on every backend: zeroed gradients, averages, telemetry."""

from __future__ import annotations

import math

import pytest
import torch

import onepass

from .cases import (
    STEP_FORMATS,
    STEP_LIST,
    adamw,
    assert_same,
    clone,
    make_params,
    runs_here,
    same_bits,
    set_grads,
    snapshot,
    train,
)

NAMES = runs_here()
RUNS = [pytest.param(name, id=name) for name in NAMES]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeroed_gradients_and_the_same_bits(name, dtype):
    ours = make_params(STEP_LIST, dtype, seed=1)
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


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
def test_averages_are_the_bits_of_the_reference_and_change_no_others(name, options):
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    options = {**options, "ema_decay": 0.75}
    results = []
    for backend in (name, "reference"):
        params = make_params(STEP_LIST, dtype, seed=1)
        optimizer = adamw(params, backend=backend, **options)
        train(optimizer, params, 3)
        results.append(optimizer)
    assert_same(*results)
    params = make_params(STEP_LIST, dtype, seed=1)
    plain = adamw(params, backend=name, **{**options, "ema_decay": None})
    train(plain, params, 3)
    for p, q in zip(params, results[0].param_groups[0]["params"], strict=True):
        assert same_bits(p.detach(), q.detach())


def test_an_average_is_what_its_formula_says_and_starts_at_the_weight():
    params = make_params(STEP_LIST, torch.float32, seed=1)
    optimizer = adamw(params, ema_decay=0.75)
    expected = [p.detach().double() for p in params]
    for step in range(5):
        set_grads(params, torch.float32, seed=step)
        optimizer.step()
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, params, strict=True)]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], e.float(), rtol=1e-6, atol=1e-6)


def test_averages_are_swapped_in_and_out():
    params = make_params(STEP_LIST, torch.bfloat16, seed=1)
    optimizer = adamw(params, ema_decay=0.5, weights="split16")
    without = adamw(params, weights="split16")
    with (
        pytest.raises(RuntimeError, match="weights have no averages"),
        without.averaged_weights(),
    ):
        pass
    # Before the first step the averages are the weights.
    weights = [p.detach().clone() for p in params]
    with optimizer.averaged_weights():
        assert all(map(torch.equal, params, weights))
        with pytest.raises(RuntimeError, match=r"leave averaged_weights\(\)"):
            optimizer.step()
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
    params = make_params(STEP_LIST, torch.float32, seed=1)
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
    params = make_params(STEP_LIST, dtype, seed=1)
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
        params = make_params(
            [(100_000,), (33,)] if name == "cpu" else STEP_LIST, torch.float32, seed=1
        )
        optimizer = adamw(params, backend=name, telemetry=True)
        train(optimizer, params, 1)
        found.append(optimizer.telemetry[0])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
