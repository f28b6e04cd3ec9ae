"""The triton backend on a GPU: steps in a CUDA graph, and steps without synchronization."""

from __future__ import annotations

import math

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CASES, assert_same, last_variant, make_params, set_grads
from .support.devices import on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SIZES = [(33,), (5000,), (7, 37), ()]
FP32, BF16 = torch.float32, torch.bfloat16
STORED = [(states, "native", FP32) for states in STATE_FORMATS]
STORED += [("mx8", weights, BF16) for weights, form in WEIGHT_FORMATS.items() if BF16 in form.codes]


def make(cls=onepass.AdamW, dtype=FP32, **options):
    params = on_gpu(make_params(SIZES, dtype, seed=1))
    for param in params:
        param.grad = torch.zeros_like(param)
    groups = [{"params": params[:2]}, {"params": params[2:], "seed": 3}]
    return cls(groups, **{"lr": 0.01, "backend": "triton", "seed": 7, **options})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def fill(optimizer, step, value=None):
    """Writes the gradients of a step in place; `value` replaces one element of them."""
    params = params_of(optimizer)
    sources = make_params(SIZES, params[0].dtype, seed=1)
    set_grads(sources, params[0].dtype, seed=step)
    for param, source in zip(params, sources, strict=True):
        param.grad.copy_(source.grad)
    if value is not None:
        params[1].grad[17] = value


WARM = 2  # steps before a capture, which build the plan and compile the kernels


def captured(optimizer):
    """A CUDA graph of one step, captured after WARM steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(WARM):
            fill(optimizer, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def assert_replays_are_eager_steps(change=fill, steps=4, made=make, **options):
    """Compares replays with eager steps. change(optimizer, step) runs before each of them."""
    eager, replayed = made(**options), made(**options)
    for step in range(WARM):
        fill(eager, step)
        eager.step()
    graph = captured(replayed)
    assert_same(replayed, eager)
    for step in range(WARM, WARM + steps):
        for optimizer, run in ((eager, eager.step), (replayed, graph.replay)):
            change(optimizer, step)
            run()
    assert_same(replayed, eager)
    return eager, replayed


@pytest.mark.parametrize(("states", "weights", "dtype"), STORED)
def test_every_format(states, weights, dtype):
    _, optimizer = assert_replays_are_eager_steps(states=states, weights=weights, dtype=dtype)
    assert all(state["step"] == WARM + 4 for state in optimizer.state.values())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_rule(case):
    assert_replays_are_eager_steps(cls=case.ours, **last_variant(case, "bf16"), states="bf16")


def test_tensor_lr_may_change_between_replays():
    def change(optimizer, step):
        fill(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"].fill_(0.1 / step)

    eager, _ = assert_replays_are_eager_steps(
        change, 3, lambda: make(lr=torch.tensor(0.01, device="cuda"))
    )
    constant = make()
    for step in range(WARM + 3):
        fill(constant, step)
        constant.step()
    pairs = zip(params_of(constant), params_of(eager), strict=True)
    assert not any(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping_skipping_averages_and_telemetry(norm_type):
    def change(optimizer, step):
        fill(optimizer, step, math.inf if step == WARM + 1 else None)

    eager, replayed = assert_replays_are_eager_steps(
        change, max_grad_norm=0.5, norm_type=norm_type, skip_nonfinite=True, zero_grads=True,
        telemetry=True, ema_decay=0.9, states="mx8",
    )  # fmt: skip
    assert replayed.skipped_steps == eager.skipped_steps == 1
    assert replayed.grad_norm == eager.grad_norm > 0.5
    assert not any(bool(p.grad.any()) for p in params_of(replayed))
    for ours, theirs in zip(replayed.telemetry, eager.telemetry, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_scale_and_a_flag_that_change_between_replays():
    def change(optimizer, step):
        fill(optimizer, step)
        optimizer.grad_scale.fill_(2.0**step)
        optimizer.found_inf.fill_(float(step == WARM + 2))

    def scaled():
        optimizer = make()
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        return optimizer

    eager, replayed = assert_replays_are_eager_steps(change, made=scaled)
    assert replayed.skipped_steps == eager.skipped_steps == 1


def test_steps_with_other_gradients_between_replays():
    """A captured step reads the gradient tensors of the capture, also after steps with others."""
    eager, mixed = make(), make()
    for step in range(WARM):
        fill(eager, step)
        eager.step()
    graph = captured(mixed)
    static = [p.grad for p in params_of(mixed)]
    for step in range(WARM, WARM + 6):
        fill(eager, step)
        eager.step()
        for p, grad in zip(params_of(mixed), static, strict=True):
            p.grad = torch.empty_like(grad) if step % 3 == 1 else grad
        fill(mixed, step)
        if step % 3 == 2:
            graph.replay()
        else:
            mixed.step()
    assert_same(mixed, eager)


@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_a_step_does_not_wait_for_the_device(states):
    rate = torch.tensor(0.01, device="cuda")
    optimizer = make(
        lr=rate, max_grad_norm=0.5, skip_nonfinite=True, zero_grads=True, telemetry=True,
        ema_decay=0.9, states=states,
    )  # fmt: skip
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            for p in params_of(optimizer):
                p.grad = torch.full_like(p, 0.1 * step)
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.01 * step
            rate.mul_(0.5)
            optimizer.max_grad_norm = 0.1 + step
            optimizer.step()
        found = optimizer.telemetry
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 2
    assert optimizer.skipped_steps == 0
    assert all(state["step"] == 6 for state in optimizer.state.values())


def test_telemetry_is_the_same_run_after_run():
    params = [torch.nn.Parameter(p.cuda()) for p in make_params([(300_001,), (77,)], FP32, seed=1)]
    optimizer = onepass.SGD(params, lr=0.0, backend="triton", telemetry=True)
    set_grads(cpu := make_params([(300_001,), (77,)], FP32, seed=1), FP32, seed=0)
    for p, q in zip(params, cpu, strict=True):
        p.grad = q.grad.cuda()
    found = []
    for _ in range(10):
        optimizer.step()
        found.append(optimizer.telemetry[0])
    # Groups of up to eight squares are added in fp32 and the group sums in float64.
    norm = torch.cat([q.grad.double() for q in cpu]).norm()
    assert float(found[0]["grad_norm"]) == pytest.approx(float(norm), rel=9 * 2.0**-24)
    assert all(torch.equal(f[name], found[0][name]) for f in found for name in f)
