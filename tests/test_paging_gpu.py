"""Paged states on a GPU: equality with the CPU, streams, pinned memory and device memory."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.paging import slabs
from onepass.paging.links import CudaLink, _runtime
from onepass.paging.options import SMALLEST_PAGE, Paging

from .cases import (
    CASES,
    EVERY_FORMAT,
    FORMAT_IDS,
    assert_same,
    last_variant,
    make_params,
    same_bits,
    set_grads,
)
from .paging_cases import SHAPES
from .support.devices import copy_grads, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SMALL = Paging(page_bytes=SMALLEST_PAGE)


def steps(cpu, params, gpu, gpu_params, count, start=0):
    for step in range(start, start + count):
        set_grads(params, torch.float32, step)
        copy_grads(gpu_params, params)
        cpu.step()
        gpu.step()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("states", "weights", "dtype"), EVERY_FORMAT, ids=FORMAT_IDS)
def test_every_format(dtype, weights, states, backend):
    cases = CASES if backend == "cuda" else [c for c in CASES if c.name == "adamw"]
    for case in cases:
        for budget in (0, 40_000):
            params = make_params(SHAPES, dtype, 1)
            gpu_params = on_gpu(params)
            options = {**last_variant(case, states), "states": states, "weights": weights}
            cpu = case.ours(params, **options, backend="cpu")
            gpu = case.ours(
                gpu_params, **options, backend=backend, paged=Paging(budget, SMALLEST_PAGE)
            )
            steps(cpu, params, gpu, gpu_params, 3)
            assert_same(gpu, cpu)


def big(paged, **options):
    """A CPU and a GPU optimizer, each with 64 MiB of fp32 states."""
    params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(8)]
    gpu_params = on_gpu(params)
    cpu = onepass.AdamW(params, **options)
    return cpu, params, onepass.AdamW(gpu_params, **options, paged=paged), gpu_params


def test_reads_wait_for_copies_on_a_busy_device():
    """Steps are issued faster than the device runs them; reading a state waits for its copies."""
    cpu, params, gpu, gpu_params = big(Paging(page_bytes=1 << 20))
    for step in range(5):
        torch.cuda._sleep(100_000_000)
        steps(cpu, params, gpu, gpu_params, 1, step)
    assert_same(gpu, cpu)


def test_side_streams_one_after_another():
    cpu, params, gpu, gpu_params = big(Paging(page_bytes=1 << 20), states="mx8")
    for step in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            steps(cpu, params, gpu, gpu_params, 1, step)
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(gpu, cpu)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_step_does_not_synchronize(backend):
    params = [torch.nn.Parameter(torch.ones(1 << 18, device="cuda")) for _ in range(4)]
    optimizer = onepass.AdamW(
        params, max_grad_norm=1.0, paged=Paging(page_bytes=1 << 19), backend=backend
    )
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_states_are_in_pinned_memory():
    _, _, gpu, gpu_params = big(SMALL)
    for p in gpu_params:
        p.grad = torch.ones_like(p)
    gpu.step()
    for p in gpu_params:
        assert gpu.state[p]["exp_avg"].device.type == "cpu"
        assert gpu.state[p]["exp_avg"].is_pinned()


@pytest.mark.parametrize("budget", [0, 24 << 20, 1 << 30])
def test_device_memory_matches_the_prediction(budget):
    paged = Paging(budget, page_bytes=1 << 20)
    params = [torch.nn.Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = onepass.AdamW(params, paged=paged, backend="cuda")
    (predicted,) = onepass.paging.footprints(optimizer).values()
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    expected = predicted.resident + predicted.ring
    # The tables of the plans come on top: at least 512 bytes each, and a row for each chunk.
    tables = 2048 * (2 + 64) + 128 * sum(p.numel() for p in params) // 1024
    assert expected <= peak <= 1.005 * expected + tables


def test_memory_that_cannot_be_pinned(monkeypatch):
    """A refusal by the CUDA driver itself: the same memory cannot be registered twice."""
    pin = CudaLink.pin

    def refused(self, address, nbytes):
        undo = pin(self, address, nbytes)
        try:
            return pin(self, address, nbytes)
        finally:
            undo()

    monkeypatch.setattr(CudaLink, "pin", refused)
    monkeypatch.setattr(slabs, "_warned", False)
    cpu, params, gpu, gpu_params = big(Paging(page_bytes=1 << 20))
    with pytest.warns(UserWarning, match="cannot be pinned"):
        steps(cpu, params, gpu, gpu_params, 3)
    assert not gpu.state[gpu_params[0]]["exp_avg"].is_pinned()
    assert_same(gpu, cpu)
    assert int(_runtime().cudaMemGetInfo(0)[0]) >= 0  # no CUDA error is pending


def test_released_gradients():
    nets, optimizers = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(6)))
        nets.append(net.to(device))
        paged = Paging(page_bytes=1 << 17) if device == "cuda" else False
        optimizers.append(onepass.AdamW(nets[-1].parameters(), states="mx8", paged=paged))
    onepass.release_gradients(nets[1], optimizers[1])
    handles = [
        p.register_hook(lambda grad, q=q: grads.append((q, grad.cpu())))
        for p, q in zip(nets[1].parameters(), nets[0].parameters(), strict=True)
    ]
    for step in range(4):
        grads: list = []
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step)).cuda()
        torch.cuda._sleep(20_000_000)
        nets[1](x).square().mean().backward()
        optimizers[1].step()
        for q, grad in grads:
            q.grad = grad
        optimizers[0].step()
    assert len(handles) == 6
    assert_same(optimizers[1], optimizers[0])


@pytest.mark.parametrize("second", [False, True, "1GB"])
def test_resuming(second):
    cpu, params, gpu, gpu_params = big(Paging(page_bytes=1 << 20), states="bf16")
    steps(cpu, params, gpu, gpu_params, 2)
    saved = gpu.state_dict()
    resumed = onepass.AdamW(gpu_params, states="bf16", paged=second)
    resumed.load_state_dict(saved)
    del gpu, saved
    steps(cpu, params, resumed, gpu_params, 2, 2)
    assert_same(resumed, cpu)


def test_deleting_an_optimizer_with_pending_copies():
    """Deletes an optimizer while its last copies may still write to its memory."""
    for _ in range(10):
        _, _, gpu, gpu_params = big(Paging(page_bytes=1 << 20))
        for p in gpu_params:
            p.grad = torch.ones_like(p)
        gpu.step()
        gpu.step()
        del gpu
    torch.cuda.synchronize()
    assert all(same_bits(p.detach().cpu(), gpu_params[0].detach().cpu()) for p in gpu_params)


def test_a_step_cannot_be_captured():
    _, _, gpu, gpu_params = big(Paging(page_bytes=1 << 20))
    for p in gpu_params:
        p.grad = torch.ones_like(p)
    gpu.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
        gpu.step()
    torch.cuda.synchronize()
    gpu.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_two_devices():
    params = make_params(SHAPES, torch.float32, 1)
    devices = [f"cuda:{i % 2}" for i in range(len(params))]
    gpu_params = [
        torch.nn.Parameter(p.detach().to(d)) for p, d in zip(params, devices, strict=True)
    ]
    cpu, gpu = (
        onepass.AdamW(params, states="mx8"),
        onepass.AdamW(gpu_params, states="mx8", paged=SMALL),
    )
    for step in range(3):
        set_grads(params, torch.float32, step)
        for p, q in zip(gpu_params, params, strict=True):
            p.grad = q.grad.to(p.device)
        cpu.step()
        gpu.step()
    assert_same(gpu, cpu)
