"""Averages, telemetry, gradient release, paging, loss scalers and streams, on each device."""

from __future__ import annotations

import math

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.paging.options import Paging

from .cases import CASES, last_variant, same_bits, snapshot
from .support.devices import ON_GPU, Pair, each_target, stream_of

BF16 = torch.bfloat16
FORMATS = [(torch.float32, {}), (BF16, {"states": "mx8", "weights": "split8"})]
FORMAT_IDS = ["fp32", "mx8-split8"]


def network(device, dtype=torch.float32, width=64):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.LayerNorm(width),
        torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 4),
    ).to(device, dtype)  # fmt: skip


def loss_of(net, step):
    weight = next(net.parameters())
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return net(x.to(weight.device, weight.dtype)).float().square().mean()


# --- averages and telemetry ------------------------------------------------------------------


@each_target
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
def test_averages_of_weights(device, backend, dtype, options):
    """Averages have the bits of the reference, and averaged_weights() restores the weights."""
    pair = Pair(device, backend, dtype=dtype, ema_decay=0.9, **options)
    for step in range(3):
        pair.step(step)
    pair.assert_same()
    assert all("ema" in pair.ours.state[p] for p in pair.params)
    before = snapshot(pair.ours)
    with pair.ours.averaged_weights():
        for p, q in zip(pair.params, pair.twins, strict=True):
            average = pair.reference.state[q]["ema"]
            assert same_bits(p.detach().cpu(), average.to(dtype))
    assert all(map(same_bits, before, snapshot(pair.ours)))
    pair.step(3)
    pair.assert_same()


@each_target
@pytest.mark.parametrize("skipped", [False, True], ids=["", "skipped"])
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
def test_telemetry(device, backend, dtype, options, skipped):
    """Weights have the bits of the reference; norms differ only by the rounding of their sums."""
    pair = Pair(device, backend, dtype=dtype, telemetry=True, skip_nonfinite=True, **options)
    for step in range(3):
        pair.set_grads(step)
        if skipped and step == 2:
            for params in (pair.params, pair.twins):
                params[-1].grad[7], params[0].grad[3] = math.inf, math.nan
        pair.ours.step()
        pair.reference.step()
        (found,), (expected,) = pair.ours.telemetry, pair.reference.telemetry
        assert found.keys() == expected.keys()
        assert int(found["nonfinite"]) == int(expected["nonfinite"])
        for name in ("grad_norm", "weight_norm", "update_norm"):
            assert found[name].device.type == device
            torch.testing.assert_close(
                found[name].cpu(), expected[name], rtol=2e-6, atol=0, equal_nan=True
            )
    if skipped:
        assert int(found["nonfinite"]) == 2
        assert float(found["update_norm"]) == 0
    assert int(pair.ours.skipped_steps) == int(skipped)
    pair.assert_same()


# --- gradient release ---


def released(device, backend, cls=onepass.AdamW, dtype=torch.float32, previous=False, **options):
    """A network with gradient release, its Pair, and the gradients.

    Returns:
        (net, pair, grads). Each backward pass fills grads with a copy of every gradient.
    """
    net = network(device, dtype)
    pair = Pair(device, backend, params=net.parameters(), cls=cls, **options)
    # The optimizer must have the network's own parameters.
    assert pair.params[0] is net[0].weight
    grads = {}
    for p in pair.params:
        p.register_hook(lambda grad, p=p: grads.__setitem__(p, grad.clone()))
    onepass.release_gradients(net, pair.ours, clip_by_previous_norm=previous)
    return net, pair, grads


@each_target
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_released_gradients_give_the_bits_of_plain_steps(device, backend, case, states):
    options = {**last_variant(case, states), "states": states}
    net, pair, grads = released(device, backend, case.ours, **options)
    for step in range(3):
        loss_of(net, step).backward()
        assert all(p.grad is None for p in pair.params)
        pair.ours.step()
        pair.step_reference([grads[p] for p in pair.params])
    pair.assert_same()


@each_target
def test_released_gradients_accumulate_while_paused(device, backend):
    options = {"states": "mx8", "weights": "split8"}
    net, pair, grads = released(device, backend, dtype=BF16, **options)
    for step in range(3):
        with pair.ours.released.paused():
            loss_of(net, 2 * step).backward()
        first = [p.grad.clone() for p in pair.params]
        loss_of(net, 2 * step + 1).backward()
        sums = [a + grads[p] for a, p in zip(first, pair.params, strict=True)]
        pair.step_reference(sums)
    pair.assert_same()


@each_target
def test_released_gradients_are_clipped_by_the_norm_of_the_step_before(device, backend):
    net, pair, grads = released(device, backend, previous=True, max_grad_norm=0.05)
    pair.reference.max_grad_norm = None
    norm = 0.0
    for step in range(4):
        loss_of(net, step).backward()
        pair.ours.step()
        found = [grads[p] for p in pair.params]
        factor = min(1.0, 0.05 / (norm + 1e-6))
        pair.step_reference([grad * factor for grad in found])
        norm = float(torch.cat([grad.double().flatten() for grad in found]).norm())
        assert float(pair.ours.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert norm > 0.05
    for p, q in zip(pair.params, pair.twins, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=2e-6)


# --- paged states ----------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("budget", [0, 1 << 17])
def test_paged_states_while_torchs_allocator_runs_out_of_memory(device, backend, budget):
    """The memory of gradients is freed and overwritten while pages are still being copied.

    At its limit, torch returns cached memory to the driver.
    """
    gpu = device == "cuda"
    net = network(device, width=1024 if gpu else 256)
    paging = {"paged": Paging(budget, page_bytes=1 << 16)}
    pair = Pair(device, backend, params=net.parameters(), ours=paging)
    if gpu:
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + (1 << 30)
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        for step in range(6):
            loss_of(net, step).backward()
            grads = [p.grad.to("cpu", copy=True) for p in pair.params]
            if gpu:
                torch.cuda._sleep(20_000_000)
            pair.ours.step()
            pair.ours.zero_grad()
            garbage = [torch.full_like(p, math.nan) for p in pair.params]
            # Three blocks that together exceed the limit. No block fits into the memory of the
            # previous ones.
            for size in (300, 350, 400) if gpu else (1, 2, 3):
                numel = (size << 18) + step * (1 << 22 if gpu else 0)
                garbage = torch.full((numel,), math.nan, device=device)
            del garbage
            pair.step_reference(grads)
        if gpu:
            assert torch.cuda.memory_stats()["num_alloc_retries"] > retries
    finally:
        if gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    (footprint,) = onepass.paging.footprints(pair.ours).values()
    assert footprint.host > 0
    assert (footprint.resident > 0) == (budget > 0)
    pair.assert_same()


# --- loss scalers ----------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("kind", ["torch", "torch-fused", "onepass"])
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
def test_a_step_that_a_loss_scaler_skips_changes_nothing(device, backend, kind, dtype, options):
    """The other steps have the bits of steps without a scaler, because scales are powers of two."""
    if kind != "onepass" and dtype == BF16:
        pytest.skip("torch's scaler has no CUDA kernel for gradients in bf16")
    ours = {"fused": True} if kind == "torch-fused" else {}
    pair = Pair(device, backend, dtype=dtype, ours=ours, **options)
    library = onepass if kind == "onepass" else torch.amp
    scaler = library.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.ones((), device=device))
    for step in range(5):
        pair.set_grads(step)
        for p in pair.params:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            pair.params[-1].grad[7] = math.inf
        before = snapshot(pair.ours)
        scaler.step(pair.ours)
        scaler.update()
        if step == 2:
            assert all(map(same_bits, before, snapshot(pair.ours)))
        else:
            pair.reference.step()
    assert scaler.get_scale() == 512.0
    assert {float(state["step"]) for state in pair.ours.state.values()} == {4.0}
    assert int(pair.ours.skipped_steps) == (0 if kind == "torch" else 1)
    pair.assert_same()


@each_target
@pytest.mark.parametrize("kind", ["torch-fused", "onepass"])
def test_a_loss_scaler_around_a_backward_pass_in_fp16(device, backend, kind):
    net = network(device)
    ours = {"fused": True} if kind == "torch-fused" else {}
    pair = Pair(device, backend, params=net.parameters(), ours=ours, states="mx8")
    library = onepass if kind == "onepass" else torch.amp
    # The initial scale overflows in fp16.
    scaler = library.GradScaler(device, init_scale=2.0**18)
    taken = 0
    for step in range(16):
        pair.ours.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = net(torch.ones(5, 8, device=device)).float().square().mean() * (1 + step)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(pair.ours)
        scaler.update()
        if scaler.get_scale() == scale:
            taken += 1
            pair.step_reference([p.grad / scale for p in pair.params])
    assert 0 < taken < 16
    assert int(pair.ours.skipped_steps) == 16 - taken
    pair.assert_same()


# --- streams ---------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
def test_a_backward_pass_on_another_stream(device, backend, dtype, options, paged):
    """The step runs on the current stream, which waits for the stream of the backward pass."""
    net = network(device, dtype)
    pair = Pair(device, backend, params=net.parameters(), ours={"paged": paged}, **options)
    side, on_side = stream_of(device)
    for step in range(4):
        pair.ours.zero_grad()
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with on_side():
            if side is not None:
                torch.cuda._sleep(50_000_000)
            loss_of(net, step).backward()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        pair.ours.step()
        pair.step_reference()
    pair.assert_same()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_gpu_serves_both_of_its_backends(device):
    """Otherwise the tests of this file that name a backend would be skipped without notice."""
    for name in ("cuda", "triton"):
        assert BACKENDS[name].unavailable(torch.device(device)) == ""
