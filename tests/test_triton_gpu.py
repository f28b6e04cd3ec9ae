"""The triton backend on a GPU: the reference's bits, streams, large tensors, launches."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.formats.floats import encode_bf16_stochastic
from onepass.numerics.random_bits import random_bits

from .cases import CASES, DTYPES, FORMATS, IDS, SIZES, VARIANTS, make_params, same_bits, set_grads
from .test_bits import SPECIAL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def _available():
    """With a GPU, a backend that does not serve it is a failure, not a reason to skip."""
    if torch.cuda.is_available():
        assert BACKENDS["triton"].unavailable(torch.device("cuda")) == ""


def on_gpu(params):
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def assert_same_as_cpu(gpu, cpu):
    pairs = zip(gpu.param_groups, cpu.param_groups, strict=True)
    for i, (p, q) in enumerate(
        pair for a, b in pairs for pair in zip(a["params"], b["params"], strict=True)
    ):
        assert same_bits(p.detach().cpu(), q.detach()), f"parameter {i}"
        assert gpu.state[p].keys() == cpu.state[q].keys()
        for key, value in gpu.state[p].items():
            assert same_bits(value.cpu(), cpu.state[q][key]), f"{key} of parameter {i}"


def copy_grads(params, from_params):
    for param, source in zip(params, from_params, strict=True):
        if source.grad is None:
            param.grad = None
            continue
        if source.grad.dtype != param.dtype:
            param.grad_dtype = None
        param.grad = source.grad.to(param.device, copy=True)


COMBINATIONS = list(itertools.product(DTYPES, DTYPES, FORMATS))


@pytest.mark.parametrize(("case", "variant", "name"), VARIANTS, ids=IDS)
def test_every_rule_option_dtype_format_and_odd_size_in_one_launch(case, variant, name):
    groups, gpu_groups, all_params = [], [], []
    for i, (dtype, _, states) in enumerate(COMBINATIONS):
        params = make_params([*SIZES, (5000 + i,)], dtype, seed=i)
        gpu_params = on_gpu(params)
        groups.append({"params": params, "states": states})
        gpu_groups.append({"params": gpu_params, "states": states})
        all_params.append((params, gpu_params))
    cpu = case.ours(groups, **variant, backend="reference", seed=7)
    gpu = case.ours(gpu_groups, **variant, backend="triton", seed=7)
    for step in range(3):
        for i, (params, gpu_params) in enumerate(all_params):
            set_grads(params, COMBINATIONS[i][1], seed=100 * step + i)
            copy_grads(gpu_params, params)
        cpu.step()
        gpu.step()
    assert_same_as_cpu(gpu, cpu)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(("dtype", "states"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("first", [0, 1])
def test_large_tensors_aligned_and_misaligned(case, dtype, states, first):
    *_, variant = case.variants()
    storage = make_params([(300_001,)], dtype, seed=2)[0].detach()
    cpu_param = torch.nn.Parameter(storage[first:].clone())
    gpu_param = torch.nn.Parameter(storage.cuda()[first:])
    assert gpu_param.data_ptr() % 16 == first * dtype.itemsize
    cpu = case.ours([cpu_param], **variant, states=states, backend="reference")
    gpu = case.ours([gpu_param], **variant, states=states, backend="triton")
    for step in range(2):
        set_grads([cpu_param], dtype, seed=step)
        copy_grads([gpu_param], [cpu_param])
        cpu.step()
        gpu.step()
    assert_same_as_cpu(gpu, cpu)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_special_values(case):
    values = torch.tensor(SPECIAL)
    for variant, dtype, states in itertools.product(case.variants(), DTYPES, FORMATS):
        cpu_param = torch.nn.Parameter(values.repeat_interleave(len(values)).to(dtype))
        (gpu_param,) = on_gpu([cpu_param])
        cpu = case.ours([cpu_param], **variant, states=states, backend="reference")
        gpu = case.ours([gpu_param], **variant, states=states, backend="triton")
        for _ in range(2):
            cpu_param.grad = values.repeat(len(values)).to(dtype)
            copy_grads([gpu_param], [cpu_param])
            cpu.step()
            gpu.step()
        assert_same_as_cpu(gpu, cpu)


def test_none_picks_triton_where_there_is_no_cuda_library(monkeypatch):
    monkeypatch.setattr(onepass.ops, "cuda_missing", lambda: "left out")
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    assert onepass.backends.choose(param.device).name == "triton"


def test_a_side_stream_is_the_one_that_is_used():
    """Gradients come from slow work on the same stream: a launch elsewhere would read old ones."""
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
    assert_same_as_cpu(gpu, cpu)


def test_many_steps_in_flight_keep_their_own_hyperparameters():
    """The host runs ahead of a busy device, and rewrites no table that a copy still reads."""
    cpu_param = torch.nn.Parameter(torch.ones(1000))
    (gpu_param,) = on_gpu([cpu_param])
    optimizers = []
    for param, backend in ((cpu_param, "reference"), (gpu_param, "triton")):
        optimizer = onepass.SGD([param], lr=0.0, backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()  # compiled before the device is kept busy
        torch.cuda._sleep(500_000_000)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 0.001 * step
            if step % 3 == 0:
                param.grad = torch.full_like(param, float(step % 7))
            optimizer.step()
        optimizers.append(optimizer)
    torch.cuda.synchronize()
    assert_same_as_cpu(optimizers[1], optimizers[0])


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
    # What reads its own index: the random bits, on either side of 2^31 and at both ends.
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
    """Counted by the profiler, which sees every kernel that reaches the device."""
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
    """Two launches; the same bits each time, within the bound of tests/test_norm.py."""
    from .test_norm import close, mixed, prepare

    backend = BACKENDS["triton"]
    for scale in (1e-38, 1.0, 5e37):
        grads = [g.cuda() for g in mixed([*SIZES, (300_000,), (5_000_001,), (70_007,)], scale)]
        close(backend, grads)
        prepared = prepare(backend, grads)
        first = backend.norm(prepared)
        assert all(torch.equal(backend.norm(prepared), first) for _ in range(20))
