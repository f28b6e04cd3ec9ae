"""The host side of the CUDA backend, on the stand-in: launches, plans, and supported GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import onepass
from onepass.engine import backends
from onepass.engine.backends import BACKENDS, Entry, StepArgs
from onepass.formats import STATE_FORMATS
from onepass.paging.options import SMALLEST_PAGE, Paging
from onepass.rules import HYPER_WIDTH, LAYOUT, RULES

from . import cuda_shim
from .cases import STEP_FORMATS, assert_same, make_params, same_bits, set_grads
from .support.targets import STAND_IN, needs_stand_in
from .support.thorough import thorough
from .test_package import ROOT

pytestmark = [needs_stand_in, pytest.mark.usefixtures("cuda_stand_in")]

# --- the plan --------------------------------------------------------------------------------


def test_what_is_launched_and_when_a_plan_is_stale():
    params = make_params([(5,), (4, 3)], torch.float32, 0)
    set_grads(params, torch.float32, 0)
    optimizer = onepass.AdamW(params, backend=STAND_IN)
    before = cuda_shim.launches()
    optimizer.step()
    optimizer.step()
    assert cuda_shim.launches() == before + 4
    (part,) = optimizer._plan._parts
    step = StepArgs(torch.zeros(1, HYPER_WIDTH), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.backend.run(part.prepared, step)
    good = [p.grad for p in params]
    for grads in (
        [good[0], good[1].t()],
        [good[0].double(), good[1]],
        [good[0].to("meta"), good[1]],
        [good[0][:3], good[1]],
    ):
        assert not part.backend.refresh(part.prepared, params, grads)
    assert part.backend.refresh(part.prepared, params, good)
    assert part.backend.refresh(part.prepared, params, [good[0].to(torch.bfloat16), good[1]])


def test_lists_without_elements_launch_no_sweep():
    params = make_params([(0,), (3, 0)], torch.float32, 0)
    set_grads(params, torch.float32, 0)
    before = cuda_shim.launches()
    onepass.SGD(params, backend=STAND_IN).step()
    assert cuda_shim.launches() == before + 1  # the launch of advance


def test_a_list_of_two_rules_is_refused():
    entries = [
        Entry(torch.ones(3), {}, STATE_FORMATS["fp32"], 0, RULES["sgd"], 0, 0, 0),
        Entry(torch.ones(3), {0: torch.ones(3)}, STATE_FORMATS["fp32"], 0, RULES["lion"], 1, 0, 1),
    ]
    with pytest.raises(RuntimeError, match=r"must have the same rule.*\(parameter 1\)"):
        BACKENDS[STAND_IN].prepare(entries)


@pytest.mark.parametrize(
    ("weights", "states", "chunk", "resident"),
    [("native", "fp32", 8192, 3), ("split8", "mx8", 16384, 5)],
)
def test_the_chunks_at_the_end_of_a_list_are_shorter(weights, states, chunk, resident):
    """The last two waves have chunks of a quarter of the length. The bits are those of the
    reference for lists that end before, at and behind such a chunk.

    The stand-in has one multiprocessor, so that a wave is the thread blocks that are resident in
    it.
    """
    dtype = torch.float32 if states == "fp32" else torch.bfloat16
    quarters = 2 * resident
    tail = quarters * chunk // 4
    for sizes, expected in (
        ([tail], quarters),
        ([tail + 1], quarters - 3 + 1),
        ([chunk + tail], 1 + quarters),
        ([chunk + 5, tail - 6], 1 + 1 + quarters),
    ):
        found = []
        for backend in ("reference", STAND_IN):
            params = make_params([(size,) for size in sizes], dtype, 0)
            set_grads(params, dtype, 0)
            optimizer = onepass.AdamW(params, weights=weights, states=states, backend=backend)
            before = cuda_shim.blocks()
            optimizer.step()
            found.append(optimizer)
        assert cuda_shim.blocks() - before - 1 == expected, sizes  # without the block of advance
        assert_same(found[1], found[0])


@thorough
def test_accesses_of_32_bytes_give_the_same_bits():
    """The stand-in with the layout of compute capability 10.0, where a vector has eight elements of
    4 bytes instead of four."""
    environ = {**os.environ, "ONEPASS_CUDA_DEFINES": "ONEPASS_WIDEST_ACCESS=32"}
    environ.pop("ONEPASS_THOROUGH", None)  # compiles fewer kernels
    for cases in ("AdamW(*) fp32+native grad fp32 *chunks", "AdamW(*) bf16+master *chunks"):
        command = [sys.executable, "-m", "bench.digest", "--backends", "cuda", "--check"]
        command += ["--cases", cases]
        found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("weights", "states"),
    [("split8", "mx8"), ("stochastic", "mx4"), ("native", "fp32"), ("native", "dynamic8")],
)
def test_rows_of_zero_gradients_stay_on_the_fast_path(weights, states):
    """Rows of an embedding without gradients, from the first step on, also with gradients of -0."""
    dtype = torch.float32 if states == "fp32" else torch.bfloat16
    found = []
    for backend in ("reference", STAND_IN):
        params = make_params([(64, 64)], dtype, 0)
        optimizer = onepass.AdamW(params, weights=weights, states=states, backend=backend)
        for step in range(3):
            torch.manual_seed(step)
            params[0].grad = torch.randn(64, 64).to(dtype)
            params[0].grad[::2] = 0.0
            params[0].grad[::4] = -0.0
            before = cuda_shim.failed_votes()
            optimizer.step()
            assert cuda_shim.failed_votes() == before
        params[0].grad[3, 5] = 1e-38
        optimizer.step()
        found.append(optimizer)
    assert_same(found[1], found[0])


def test_a_small_eps_leaves_the_fast_path():
    found = []
    for backend in ("reference", STAND_IN):
        params = make_params([(1024,)], torch.float32, 0)
        optimizer = onepass.AdamW(params, eps=0.0, backend=backend)
        for step in range(2):
            set_grads(params, torch.float32, step)
            params[0].grad[7] = 0.0
            optimizer.step()
        found.append(optimizer)
    assert_same(found[1], found[0])


def test_ratios_to_roots_of_zero_leave_the_fast_path():
    """The codes of the first moment are multiples of 1 where the second moment is zero."""
    found = []
    for backend in ("reference", STAND_IN):
        params = make_params([(1024,)], torch.bfloat16, 0)
        optimizer = onepass.AdamW(params, weights="stochastic", states="mx4", backend=backend)
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
        state = optimizer.state[params[0]]
        assert not state["exp_avg_sq_scale"].any()
        state["exp_avg"][:16] = 0x35
        state["exp_avg_scale"].fill_(200)
        before = cuda_shim.failed_votes()
        optimizer.step()
        # One of the four rounds of a warp has these codes.
        assert cuda_shim.failed_votes() == before + (backend == STAND_IN)
        found.append(optimizer)
    assert_same(found[1], found[0])


def test_a_quotient_by_a_root_of_mx4_needs_no_exact_inverse():
    """The operations of Quick::div_by_code, for every error that PTX allows the inverse.

    The stand-in divides with the exact operation, and tests/cuda_quick.cu runs on a GPU only.
    """
    rng = np.random.default_rng(0)
    ends = np.concatenate([np.arange(4096), (1 << 23) - 1 - np.arange(4096)])
    bits = np.concatenate([ends, rng.integers(0, 1 << 23, 100_000)]).astype(np.uint32)
    x = (bits | np.uint32(0x3F800000)).view(np.float32).astype(np.float64)
    for y in (1.0, 1.25, 1.5, 1.75):
        wanted = (x / y).astype(np.float32)  # exact: the quotient of such numbers is not a tie
        exact = np.float32(1 / y)
        for inverse in (
            np.nextafter(exact, np.float32(0)),
            exact,
            np.nextafter(exact, np.float32(2)),
        ):
            quotient = (x * float(inverse)).astype(np.float32).astype(np.float64)
            remainder = (y * quotient - x).astype(np.float32).astype(np.float64)
            found = (quotient - remainder * float(inverse)).astype(np.float32)
            np.testing.assert_array_equal(found, wanted)


# --- supported devices ---


def test_the_backend_says_why_it_does_not_serve():
    cuda = BACKENDS["cuda"]
    assert "CUDA devices only" in cuda.unavailable(torch.device("cpu"))
    if torch.version.cuda is None:
        assert "built without CUDA" in cuda.unavailable(torch.device("cuda"))
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve.*Backends that can: .*reference"):
        onepass.AdamW([param], backend="cuda").step()
    assert list(backends.BACKENDS).index("cuda") < list(backends.BACKENDS).index("triton")


NO_CODE, OLD_DRIVER, NO_MEMORY = 209, 35, 2  # values of cudaError_t


@pytest.fixture
def gpus(monkeypatch):
    """A function that sets the devices of the stand-in, which torch then reports as its GPUs."""

    def set_gpus(*devices, driver=0):
        monkeypatch.setattr(onepass.ops, "_cuda_support", {})
        monkeypatch.setattr(onepass.ops, "cuda_missing", lambda: "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        cuda_shim.set_devices(*devices, driver=driver)

    yield set_gpus
    cuda_shim.set_devices()


def test_a_gpu_that_the_library_has_no_code_for_is_left_to_triton(gpus, monkeypatch):
    monkeypatch.setattr(type(BACKENDS["triton"]), "unavailable", lambda self, device: "")
    gpus((86, NO_CODE), (90, 0))
    cuda = BACKENDS["cuda"]
    reason = cuda.unavailable(torch.device("cuda", 0))
    assert "no code for the compute capability 8.6 of cuda:0" in reason
    assert "cudaErrorNoKernelImageForDevice" in reason
    assert "ONEPASS_CUDA_ARCH=8.6" in reason
    assert cuda.unavailable(torch.device("cuda")) == reason
    assert cuda.unavailable(torch.device("cuda", 1)) == ""
    assert cuda.unavailable(None) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(onepass.ops, "CUDA_LIBRARY", Path(__file__))
    with pytest.warns(UserWarning, match=r"uses Triton on cuda:0: .*ONEPASS_CUDA_ARCH=8\.6"):
        assert backends.choose(torch.device("cuda", 0)).name == "triton"
    assert backends.choose(torch.device("cuda", 1)).name == "cuda"
    with pytest.raises(RuntimeError, match=r"ONEPASS_CUDA_ARCH=8\.6"):
        backends.choose(torch.device("cuda", 0), "cuda")
    assert cuda_shim.current_device() == 0


def test_a_library_with_a_sample_of_the_kernels_is_refused(monkeypatch):
    ops = SimpleNamespace(
        load_library=lambda path: None,
        onepass=SimpleNamespace(cuda_layout=lambda: LAYOUT, cuda_refusal=lambda: "has a sample"),
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(onepass.ops, "CUDA_LIBRARY", Path(__file__))
    monkeypatch.setattr(onepass.ops, "missing", "")
    monkeypatch.setattr(torch, "ops", ops)
    assert onepass.ops.cuda_missing.__wrapped__() == "test_cuda_shim.py has a sample"


def test_without_a_gpu_that_can_be_served_every_reason_is_given(gpus):
    gpus((86, NO_CODE), (120, 222))
    reason = BACKENDS["cuda"].unavailable(None)
    assert "ONEPASS_CUDA_ARCH=8.6" in reason
    assert "ONEPASS_CUDA_ARCH=12.0" in reason
    assert "cudaErrorUnsupportedPtxVersion" in reason


def test_a_driver_too_old_for_the_toolkit_is_a_reason(gpus):
    gpus((90, 0), driver=OLD_DRIVER)
    for device in (None, torch.device("cuda", 0)):
        reason = BACKENDS["cuda"].unavailable(device)
        assert "driver is too old for CUDA 13.0" in reason
        assert "cudaErrorInsufficientDriver" in reason


def test_what_a_gpu_can_run_is_asked_once_unless_the_reason_may_pass(gpus):
    cuda, device = BACKENDS["cuda"], torch.device("cuda", 0)
    gpus((90, NO_MEMORY))
    assert "do not load on cuda:0" in cuda.unavailable(device)
    cuda_shim.set_devices((90, 0))
    assert cuda.unavailable(device) == ""
    cuda_shim.set_devices((90, NO_CODE))
    assert cuda.unavailable(device) == ""


def test_cuda_is_not_asked_where_there_is_no_gpu(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(onepass.ops, "cuda_unsupported", lambda device: pytest.fail("asked"))
    for device in (None, torch.device("cuda")):
        assert BACKENDS["cuda"].unavailable(device) == "torch finds no GPU"


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
def test_paged_states(options, links):
    """Tests several pages, parameters cut into parts, and a norm over entries without states."""
    dtype = torch.bfloat16 if options.get("weights") else torch.float32
    found = []
    for backend, paged in (
        ("reference", False),
        (STAND_IN, False),
        (STAND_IN, Paging(0, SMALLEST_PAGE)),
    ):
        params = make_params([(33,), (20_000,), (0,), (300,)], dtype, 1)
        optimizer = onepass.AdamW(
            params, **options, backend=backend, paged=paged, max_grad_norm=1e9, skip_nonfinite=True
        )
        for step in range(3):
            set_grads(params, dtype, step)
            if step == 1:
                params[1].grad[-1] = torch.inf
            optimizer.step()
        found.append(optimizer)
    assert_same(found[2], found[0])
    assert same_bits(found[2].grad_norm, found[1].grad_norm)
    assert links[0].copies
