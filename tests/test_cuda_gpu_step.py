"""Whole steps of the cuda backend on a GPU: capture and replay, skipping, no synchronization."""

from __future__ import annotations

import math
import time

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS

from .cases import (
    CASES,
    EVERY_FORMAT,
    FORMAT_IDS,
    SIZES,
    advance,
    assert_same,
    last_variant,
    make_params,
    same_bits,
    set_grads,
)
from .support.devices import copy_grads, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture
def no_waiting():
    """A function after whose call any synchronization of the host with the device is an error."""

    def begin():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield begin
    torch.cuda.set_sync_debug_mode("default")


def fill(params, seed):
    """Writes the gradients of a step into the existing tensors, or into new ones."""
    cpu = [torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in params]
    set_grads(cpu, params[0].dtype, seed)
    for param, source in zip(params, cpu, strict=True):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(source.grad)


def captured(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


# --- capture ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "weights", "dtype"), EVERY_FORMAT, ids=FORMAT_IDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_replays_are_eager_steps(case, dtype, weights, states):
    options = {**last_variant(case, states), "states": states, "weights": weights, "seed": 3}
    options |= {"max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizers = []
    for _ in range(2):
        params = on_gpu(make_params([*SIZES, (20_001,)], dtype, seed=1))
        optimizers.append((params, case.ours(params, **options, backend="cuda")))
    (params, ours), (others, eager) = optimizers
    for step in range(2):
        for own, optimizer in optimizers:
            fill(own, step)
            optimizer.step()
    graph = captured(ours.step)
    for step in range(2, 6):
        fill(params, step)
        fill(others, step)
        if step == 4:  # this step is skipped
            params[-1].grad[5] = others[-1].grad[5] = math.nan
        graph.replay()
        eager.step()
        assert_same(ours, eager)
    assert int(ours.skipped_steps) == int(eager.skipped_steps) == 1
    assert float(ours.state[params[-1]]["step"]) == 5


def test_a_learning_rate_that_is_a_tensor_counts_at_every_replay():
    optimizers = []
    for _ in range(2):
        params = on_gpu(make_params([(33,), (20_001,)], torch.float32, seed=1))
        lr = torch.tensor(0.1, device="cuda")
        optimizers.append((params, lr, onepass.AdamW(params, lr=lr, backend="cuda")))
    for params, _, optimizer in optimizers:
        fill(params, 0)
        optimizer.step()
    graph = captured(optimizers[0][2].step)
    for step in range(1, 5):
        for params, lr, _ in optimizers:
            fill(params, step)
            lr.fill_(0.1 / step)
        graph.replay()
        optimizers[1][2].step()
        assert_same(optimizers[0][2], optimizers[1][2])


def test_eager_steps_between_replays_have_their_own_gradients():
    """Two graphs of one optimizer have different gradients as well."""
    cpu_params = make_params([(33,), (20_001,)], torch.bfloat16, seed=1)
    params = on_gpu(cpu_params)
    options = {"lr": 0.1, "states": "mx8", "weights": "split8"}
    cpu = onepass.AdamW(cpu_params, **options, backend="reference")
    gpu = onepass.AdamW(params, **options, backend="cuda")

    def eager(seed, dtype=torch.bfloat16):
        set_grads(cpu_params, dtype, seed)
        copy_grads(params, cpu_params)
        gpu.step()
        cpu.step()

    eager(0)
    graphs = []
    for seed in (1, 2):
        set_grads(cpu_params, torch.bfloat16, seed)
        copy_grads(params, cpu_params)
        static = [p.grad for p in params]
        graphs.append((seed, static, captured(gpu.step)))

    def replay(number):
        seed, _, graph = graphs[number]
        set_grads(cpu_params, torch.bfloat16, seed)
        graph.replay()
        cpu.step()

    replay(0)
    replay(1)
    eager(3)
    replay(0)
    eager(4, torch.float32)
    replay(1)
    eager(5)
    torch.cuda.synchronize()
    assert_same(gpu, cpu)


def test_a_graph_outlives_the_plan_that_it_was_captured_with():
    (param,) = on_gpu(make_params([(20_001,)], torch.float32, seed=1))
    (other,) = on_gpu(make_params([(3,)], torch.float32, seed=2))
    optimizer = onepass.SGD([param, other], lr=0.5, backend="cuda")
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    graph = captured(optimizer.step)
    other.grad = torch.ones_like(other)
    optimizer.step()  # a new plan, for another list
    assert same_bits(param.detach(), before - 0.5)
    other.grad = None
    garbage = [torch.full((1000,), math.nan, device="cuda") for _ in range(100)]
    graph.replay()
    assert same_bits(param.detach(), before - 0.5 - 0.5)
    del garbage


def test_a_capture_needs_a_step_before_it():
    (param,) = on_gpu(make_params([(5,)], torch.float32, seed=1))
    param.grad = torch.ones_like(param)
    optimizer = onepass.AdamW([param], backend="cuda")
    with pytest.raises(RuntimeError, match="needs a step before it"):
        captured(optimizer.step)
    optimizer.step()


# --- the host --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_step_never_waits_for_the_device(case, no_waiting):
    params = on_gpu(make_params([(33,), (20_001,)], torch.bfloat16, seed=1))
    options = {**last_variant(case, "mx8"), "states": "mx8", "max_grad_norm": 1.0}
    optimizer = case.ours(params, **options, skip_nonfinite=True, zero_grads=True, backend="cuda")
    scaler = onepass.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    grads = [[torch.ones_like(p) for p in params] for _ in range(3)]
    for step in range(6):
        if step == 2:
            no_waiting()
        for param, grad in zip(params, grads[step % 3], strict=True):
            param.grad = grad
        optimizer.param_groups[0]["lr"] = 0.01 * step
        if step % 2:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_taking_a_counted_step_back_never_waits_for_the_device(backend, no_waiting):
    if why_not := BACKENDS[backend].unavailable(torch.device("cuda")):
        pytest.skip(why_not)
    params = on_gpu(make_params([(33,), (20_001,)], torch.float32, seed=1))
    optimizer = onepass.AdamW(params, backend=backend)
    for number in range(4):
        fill(params, number)
        if number % 2:
            (part,) = optimizer.planned()._parts
            fresh = part.table.fresh.clone()
            if number == 3:
                no_waiting()
            advance(part.backend, part.table, None)
            part.backend.retreat(part.table, fresh)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_a_planned_step_takes_less_host_time_than_torchs_fused_one():
    def host_time(make):
        params = on_gpu(make_params([(64,)] * 300, torch.float32, seed=1))
        optimizer = make(params)
        for param in params:
            param.grad = torch.ones_like(param)
        times = []
        for _ in range(60):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return sorted(times[10:])[25]

    ours = host_time(lambda params: onepass.AdamW(params, backend="cuda"))
    assert ours < host_time(lambda params: torch.optim.AdamW(params, fused=True))
