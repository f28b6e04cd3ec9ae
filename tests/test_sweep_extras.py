"""Optional work of a sweep on every target: zeroing, averages, telemetry, inactive rows."""

from __future__ import annotations

import math

import pytest
import torch

import onepass
from onepass.engine.backends import StepArgs, StepSwitches

from .cases import (
    DTYPES,
    EVERY_FORMAT,
    SIZES,
    STEP_FORMATS,
    STEP_LIST,
    adamw,
    advance,
    assert_same,
    clone,
    make_params,
    same_bits,
    set_grads,
    snapshot,
    train,
)
from .support.comparison import params_of, states_of
from .support.targets import (
    compare,
    every_target,
    of_reference,
    one_in,
    other_targets,
    with_rows,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_target
def test_zeroed_gradients_and_the_same_bits(target, dtype):
    ours = make_params(STEP_LIST, dtype, seed=1, device=target.device)
    theirs = clone(ours)
    zeroing = adamw(ours, backend=target.backend, zero_grads=True, skip_nonfinite=True)
    plain = adamw(theirs, backend=target.backend)
    for step in range(2):
        for params in (ours, theirs):
            set_grads(params, dtype, seed=step)
        ours[2].grad = ours[2].grad.t().contiguous().t()  # another memory order than the weight
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


def averaged(target, number, decay):
    options = {**STEP_FORMATS[number], "ema_decay": decay}
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    params = make_params(STEP_LIST, dtype, seed=1, device=target.device)
    optimizer = adamw(params, backend=target.backend, **options)
    train(optimizer, params, 3)
    return optimizer


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
@other_targets
def test_averages_match_the_reference_and_change_nothing_else(target, options):
    number = STEP_FORMATS.index(options)
    one_in(2, target, number)
    compare(target, averaged, number, 0.75)
    with_averages, without = averaged(target, number, 0.75), averaged(target, number, None)
    for p, q in zip(params_of(with_averages), params_of(without), strict=True):
        assert same_bits(p, q)


def test_average_follows_its_formula_and_starts_at_the_weight():
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
    # Before the first step the averages equal the weights.
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
    # An optimizer without averages loads the other states.
    none = adamw(clone(params))
    none.load_state_dict(optimizer.state_dict())
    assert all("ema" not in state for state in none.state.values())
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ema of parameter 0 .* is \(3,\)"):
        adamw(clone(params), ema_decay=0.9).load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_target
def test_telemetry(target, dtype):
    """Sums of up to 300 squares, which each backend adds in its own order, at least in fp32."""
    params = make_params(STEP_LIST, dtype, seed=1, device=target.device)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    options = {"weights": "master"} if dtype == torch.bfloat16 else {}
    optimizer = onepass.AdamW(
        groups, lr=0.02, backend=target.backend, telemetry=True, max_grad_norm=0.1, **options
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


@every_target
def test_telemetry_of_a_skipped_step_counts_nonfinite_gradients(target):
    params = make_params([(33,), (300,)], torch.float32, seed=1, device=target.device)
    optimizer = adamw(params, backend=target.backend, telemetry=True, skip_nonfinite=True)
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


@every_target
def test_telemetry_is_the_same_run_after_run(target):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = make_params(
            [(100_000,), (33,)] if target.backend == "cpu" else STEP_LIST, torch.float32, seed=1
        )
        optimizer = adamw(params, backend=target.backend, telemetry=True)
        train(optimizer, params, 1)
        found.append(optimizer.telemetry[0])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# --- inactive rows ---------------------------------------------------------------------------

LARGE = [*SIZES, (2085,), (16384 + 300,)]
FEW = [0, 12, 14, 17, 20, 25, 29, 32, 40, 47, 54]
"""Indices into EVERY_FORMAT that cover each format of states and of weights."""


def mixed(target, formats, sizes, offset, **options):
    """An optimizer with a group for each of these formats, and the storages of the gradients.

    Each gradient starts `offset` elements into a storage filled with 0.5. Gradients are integers,
    so the sums of their squares are exact.
    """
    groups, storages = [], []
    for i in formats:
        states, weights, dtype = EVERY_FORMAT[i]
        shapes = [sizes[(i + j) % len(sizes)] for j in range(2)]
        params = make_params(shapes, dtype, seed=i, device=target.device)
        groups.append({"params": params, "states": states, "weights": weights})
    optimizer = onepass.AdamW(groups, lr=0.1, amsgrad=True, backend=target.backend, **options)
    for i, param in enumerate(params_of(optimizer)):
        dtype = DTYPES[i % 3]
        storage = torch.full((param.numel() + 2 * offset + 1,), 0.5, dtype=dtype)
        inside = storage[offset : offset + param.numel()]
        generator = torch.Generator().manual_seed(i)
        inside.copy_(torch.randint(-8, 9, inside.shape, generator=generator))
        storage = storage.to(target.device)
        if dtype != param.dtype:
            param.grad_dtype = None
        param.grad = storage[offset : offset + param.numel()].view_as(param)
        storages.append(storage)
    return optimizer, storages


def left_alone(target, formats, sizes, offset, every, zero, measured):
    """Takes two steps. In the second, every `every`-th row has step number 0, which disables it."""
    optimizer, storages = mixed(target, formats, sizes, offset)
    optimizer.step()
    params = params_of(optimizer)
    before = [[t.clone() for t in (p.detach(), *states_of(optimizer, p))] for p in params]
    (part,) = optimizer.adopted()._parts
    table = part.table
    if measured:
        table.telemetry = torch.full((len(table.rows), 4), -1.0).double().to(target.device)
    advance(part.backend, table, None)
    alone = [every and i % every == 0 for i in range(len(table.rows))]
    table.counters[torch.tensor(alone, dtype=torch.bool), 1] = 0
    step = StepArgs(table.hyper, table.counters, table.telemetry, StepSwitches(zero))
    part.backend.run(part.prepared, step)
    for i, (param, kept) in enumerate(zip(params, before, strict=True)):
        now = (param.detach(), *states_of(optimizer, param))
        same = [same_bits(a, b) for a, b in zip(kept, now, strict=True)]
        if alone[i // 2]:
            assert all(same)
        elif param.numel() > 31:
            assert not same[0]
        assert not zero or not param.grad.any()
    for param, storage in zip(params, storages, strict=True):
        beside = torch.cat([storage[:offset], storage[offset + param.numel() :]])
        assert bool((beside == 0.5).all())
    found = [*storages, *(t for p in params for t in (p, *states_of(optimizer, p)))]
    return found, None if table.telemetry is None else table.telemetry.cpu()


def alone_rows(target):
    formats = FEW if target.interpreted else range(len(EVERY_FORMAT))
    sizes = [(33,), (), (1025,), (257,)] if target.interpreted else LARGE
    rows = [(0, 0, True, False), (1, 2, False, True), (8, 3, True, True), (0, 2, False, False)]
    for offset, every, zero, measured in rows:
        row = offset, every, zero, measured
        names = [
            f"offset{offset}",
            every and f"every{every}",
            zero and "zero",
            measured and "measured",
        ]
        yield "-".join(filter(None, names)), (tuple(formats), tuple(sizes), *row)


@with_rows("formats,sizes,offset,every,zero,measured", alone_rows)
def test_inactive_rows_zeroed_gradients_and_telemetry(
    target, formats, sizes, offset, every, zero, measured
):
    args = (formats, sizes, offset, every, zero, measured)
    one_in(2, target, offset + measured)
    found, telemetry = left_alone(target, *args)
    expected, sums = of_reference(left_alone, *args)
    assert_same(found, expected)
    if measured:
        # Groups of eight squares are added in fp32 and the group sums in float64.
        torch.testing.assert_close(telemetry, sums, rtol=9 * 2.0**-24, atol=0, equal_nan=True)


@every_target
@pytest.mark.parametrize("offset", [0, 1])
def test_skipped_step_zeroes_gradients_only(target, offset):
    optimizer, storages = mixed(target, FEW, [(33,), (), (1025,)], offset, zero_grads=True)
    optimizer.found_inf = torch.ones((), device=target.device)
    before = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.step()
    assert all(map(same_bits, before, params_of(optimizer)))
    for param, storage in zip(params_of(optimizer), storages, strict=True):
        assert not param.grad.any()
        beside = torch.cat([storage[:offset], storage[offset + param.numel() :]])
        assert bool((beside == 0.5).all())


@every_target
def test_telemetry_of_empty_parameters_is_zero(target):
    param = torch.nn.Parameter(torch.ones(0, device=target.device))
    param.grad = torch.ones_like(param)
    optimizer = onepass.SGD([param], backend=target.backend, telemetry=True)
    optimizer.step()
    (found,) = optimizer.telemetry
    assert not any(map(bool, found.values()))


@every_target
def test_telemetry_beyond_the_range_of_squares_in_fp32(target):
    param = torch.nn.Parameter(torch.tensor([3e25, 4e25, 1e-30], device=target.device))
    param.grad = torch.tensor([3e-30, 4e-30, 0.0], device=target.device)
    optimizer = onepass.SGD([param], lr=0.0, backend=target.backend, telemetry=True)
    optimizer.step()
    (found,) = optimizer.telemetry
    for name, value in (("grad_norm", 5e-30), ("weight_norm", 5e25), ("update_norm", 0.0)):
        # The inputs are rounded to fp32 as well.
        assert float(found[name]) == pytest.approx(value, rel=10 * 2.0**-24)
