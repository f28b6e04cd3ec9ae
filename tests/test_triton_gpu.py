"""The triton backend on a GPU: streams, large tensors and launches."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.formats.floats import encode_bf16_stochastic
from onepass.numerics.random_bits import random_bits

from .cases import FORMATS, SIZES, make_params, same_bits
from .support.comparison import assert_same
from .support.devices import on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def _available():
    """On a machine with a GPU the triton backend must be available; the tests do not skip."""
    if torch.cuda.is_available():
        assert BACKENDS["triton"].unavailable(torch.device("cuda")) == ""


def test_none_picks_triton_where_there_is_no_cuda_library(monkeypatch):
    monkeypatch.setattr(onepass.ops, "cuda_missing", lambda: "left out")
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    assert onepass.backends.choose(param.device).name == "triton"


def test_step_runs_on_the_current_stream():
    """The stream also computes the gradients, slowly: a launch on another stream would read old
    ones."""
    cpu_param = torch.nn.Parameter(torch.ones(1 << 16))
    (gpu_param,) = on_gpu([cpu_param])
    cpu = onepass.AdamW([cpu_param], backend="reference")
    gpu = onepass.AdamW([gpu_param], backend="triton")
    gpu_param.grad = torch.zeros_like(gpu_param)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in range(4):
            torch.cuda._sleep(50_000_000)
            gpu_param.grad.fill_(step - 1.5)
            gpu.step()
    stream.synchronize()
    for step in range(4):
        cpu_param.grad = torch.full_like(cpu_param, step - 1.5)
        cpu.step()
    assert_same(gpu, cpu)


def test_many_steps_in_flight_keep_their_own_hyperparameters():
    """The host runs ahead of a busy device and must not overwrite tables that copies still read."""
    cpu_param = torch.nn.Parameter(torch.ones(1000))
    (gpu_param,) = on_gpu([cpu_param])
    optimizers = []
    for param, backend in ((cpu_param, "reference"), (gpu_param, "triton")):
        optimizer = onepass.SGD([param], lr=0.0, backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()  # compiles the kernels before the device is busy
        torch.cuda._sleep(500_000_000)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 0.001 * step
            if step % 3 == 0:
                param.grad = torch.full_like(param, float(step % 7))
            optimizer.step()
        optimizers.append(optimizer)
    torch.cuda.synchronize()
    assert_same(optimizers[1], optimizers[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_a_device_that_is_not_the_current_one():
    cpu_param = torch.nn.Parameter(torch.ones(5000))
    gpu_params = [torch.nn.Parameter(torch.ones(5000, device=f"cuda:{i}")) for i in (1, 0)]
    cpu = onepass.Lion([cpu_param], backend="reference")
    cpu_param.grad = torch.full((5000,), 0.5)
    cpu.step()
    gpu = onepass.Lion(gpu_params, backend="triton")
    for param in gpu_params:
        param.grad = torch.full_like(param, 0.5)
    gpu.step()
    for param in gpu_params:
        assert same_bits(param.detach().cpu(), cpu_param.detach())


@pytest.mark.parametrize("states", FORMATS)
def test_a_tensor_of_more_than_2_to_the_31_elements(states):
    numel = (1 << 31) + 4099
    needed = numel * (2 + 2 + (4 if states == "fp32" else 2)) * 1.1
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.3)
    optimizer = onepass.Lion([param], lr=0.5, states=states, backend="triton", seed=5)
    optimizer.step()
    exp_avg = optimizer.state[param]["exp_avg"]
    assert bool((param.detach() == 0.5).all())
    # The random bits depend on the element index. Compare them on both sides of 2^31 and at both
    # ends.
    plain = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    plain.grad = torch.full_like(plain, 0.3)
    fp32 = onepass.Lion([plain], lr=0.5, backend="reference")
    fp32.step()
    value = fp32.state[plain]["exp_avg"]
    for first in (0, (1 << 31) - 4, (1 << 31) + 5, numel - 8):
        found = exp_avg[first : first + 8].cpu()
        if states == "fp32":
            assert same_bits(found, value)
        else:
            bits = random_bits(5, 1, 0, first, 8) & 0xFFFF
            codes = encode_bf16_stochastic(value.numpy(), bits).view("int16")
            assert same_bits(found, torch.from_numpy(codes).view(torch.bfloat16))


@pytest.mark.parametrize("count", [300, 20_000])
def test_a_step_is_one_launch_beside_that_of_its_hyperparameters_and_a_schedule_compiles_once(
    count,
):
    """Launches are counted by the profiler, which records every kernel on the device."""
    params = on_gpu(make_params([(1 + i % 50,) for i in range(count)], torch.float32, 0))
    groups = [{"params": params[::2]}, {"params": params[1::2], "states": "bf16", "lr": 0.1}]
    optimizer = onepass.AdamW(groups, backend="triton")
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    from onepass.triton_kernels.sweep import sweep

    known = sum(len(caches[0]) for caches in sweep.device_caches.values())
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.01 * step
            optimizer.step()
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    assert kernels == ["advance", "sweep"] * 5
    assert sum(len(caches[0]) for caches in sweep.device_caches.values()) == known


def test_the_norm():
    """The norm takes two launches and has the same bits each time, within the bound of
    test_norm.py."""
    from .test_norm import close, mixed, prepare

    backend = BACKENDS["triton"]
    for scale in (1e-38, 1.0, 5e37):
        grads = [g.cuda() for g in mixed([*SIZES, (300_000,), (5_000_001,), (70_007,)], scale)]
        close(backend, grads)
        prepared = prepare(backend, grads)
        first = backend.norm(prepared)
        assert all(torch.equal(backend.norm(prepared), first) for _ in range(20))
