"""The cuda backend on a GPU: streams, large tensors, the number of launches."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.formats.floats import encode_bf16_stochastic
from onepass.numerics.random_bits import random_bits

from .cases import SIZES, make_params, same_bits
from .support.comparison import assert_same
from .support.devices import on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _available():
    """Fails if a GPU is present but the backend does not serve it, where a skip would hide that."""
    if torch.cuda.is_available():
        assert BACKENDS["cuda"].unavailable(torch.device("cuda")) == ""


def test_none_picks_cuda():
    assert onepass.backends.choose(torch.device("cuda")).name == "cuda"


def test_a_step_runs_on_the_current_stream():
    """Slow work on the same stream makes the gradients. A step elsewhere would read old ones."""
    cpu_param = torch.nn.Parameter(torch.ones(1 << 16))
    (gpu_param,) = on_gpu([cpu_param])
    cpu = onepass.AdamW([cpu_param], backend="reference")
    gpu = onepass.AdamW([gpu_param], backend="cuda")
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


def test_many_steps_in_flight_keep_their_own_hyperparameters_and_gradients():
    """The host runs ahead of the device and must not overwrite a table that a copy still reads."""
    cpu_param = torch.nn.Parameter(torch.ones(1000))
    (gpu_param,) = on_gpu([cpu_param])
    optimizers = []
    for param, backend in ((cpu_param, "reference"), (gpu_param, "cuda")):
        optimizer = onepass.SGD([param], lr=0.0, backend=backend)
        grads = [torch.full_like(param, float(i)) for i in range(7)]
        param.grad = grads[1]
        optimizer.step()
        torch.cuda._sleep(500_000_000)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 0.001 * step
            param.grad = grads[step // 3 % 7]
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
    gpu = onepass.Lion(gpu_params, backend="cuda")
    for param in gpu_params:
        param.grad = torch.full_like(param, 0.5)
    gpu.step()
    for param in gpu_params:
        assert same_bits(param.detach().cpu(), cpu_param.detach())


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_a_tensor_of_more_than_2_to_the_31_elements(states):
    numel = (1 << 31) + 4099
    needed = numel * (2 + 2 + (4 if states == "fp32" else 2)) * 1.1
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.3)
    optimizer = onepass.Lion([param], lr=0.5, states=states, backend="cuda", seed=5)
    optimizer.step()
    exp_avg = optimizer.state[param]["exp_avg"]
    assert bool((param.detach() == 0.5).all())
    # The random bits depend on the element index: compared at both ends and on both sides of 2^31.
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
def test_a_step_of_two_groups_is_one_sweep(count):
    """The profiler counts the kernels, so it sees every launch that reaches the device."""
    params = on_gpu(make_params([(1 + i % 50,) for i in range(count)], torch.float32, 0))
    groups = [{"params": params[::2]}, {"params": params[1::2], "states": "bf16", "lr": 0.1}]
    optimizer = onepass.AdamW(groups, backend="cuda")
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
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
    assert len(kernels) == 10
    assert all("advance_rows" in name for name in kernels[::2])
    assert all("sweep_formats" in name for name in kernels[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm(dtype):
    params = on_gpu(make_params([*SIZES, (1_000_001,)], dtype, seed=1))
    for param in params:
        param.grad = param.detach().clone()
    optimizer = onepass.SGD(params, backend="cuda")
    optimizer.step()
    (part,) = optimizer._plan._parts
    assert part.refresh()
    runs = [part.backend.norm(part.prepared) for _ in range(3)]
    assert all(same_bits(r.view(torch.int32), runs[0].view(torch.int32)) for r in runs)
    wide = torch.cat([p.grad.double().reshape(-1) for p in params])
    squares, largest, nonfinite = runs[0].tolist()
    assert squares == pytest.approx(float((wide * wide).sum()), rel=1e-13)
    assert (largest, nonfinite) == (float(wide.abs().max()), 0)
