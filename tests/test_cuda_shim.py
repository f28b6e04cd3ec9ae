"""The CUDA sources, compiled by g++ against tests/cuda_shim, return the bits of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass
from onepass.engine import backends
from onepass.engine.backends import BACKENDS, Entry, StepArgs
from onepass.formats import NATIVE, STATE_FORMATS, WEIGHT_FORMATS
from onepass.paging.options import SMALLEST_PAGE, Paging
from onepass.rules import HYPER_WIDTH, RULES

from . import cuda_shim
from .cases import (
    CASES,
    DTYPES,
    SIZES,
    STEP_FORMATS,
    assert_same,
    last_variant,
    make_params,
    mx4_at_its_edges,
    same_bits,
    served,
    set_grads,
    step_of_shard,
)
from .test_bits import SPECIAL

WHY_NOT = cuda_shim.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

SHIM = "cuda-shim"
CHUNK = 16384  # elements, of csrc/cuda/tuning.h
# Whether it maximizes is a factor in the table of numbers: either will do for a kernel.
VARIANTS = [
    (case, variant, f"{case.name}-{i}")
    for case in CASES
    for i, variant in enumerate(case.variants())
    if variant["maximize"] == (i // 2 % 2 == 1)
]
IDS = [name for _, _, name in VARIANTS]
WEIGHTS = [(dtype, name) for name, form in WEIGHT_FORMATS.items() for dtype in form.codes]
STORED = [(*weight, states) for weight, states in itertools.product(WEIGHTS, STATE_FORMATS)]
STORED_IDS = [f"{str(d).removeprefix('torch.')}-{w}-{s}" for d, w, s in STORED]


@pytest.fixture(autouse=True)
def _shim(monkeypatch):
    monkeypatch.setitem(BACKENDS, SHIM, cuda_shim.ShimBackend())


def step_both(build, steps, grad_dtypes):
    """Runs an optimizer on both backends and compares them; build(backend) -> (params, it)."""
    optimizers = []
    for backend in ("reference", SHIM):
        params, optimizer = build(backend)
        for step in range(steps):
            for i, (param, dtype) in enumerate(zip(params, grad_dtypes, strict=True)):
                set_grads([param], dtype, seed=1000 * step + i)
            optimizer.step()
        optimizers.append(optimizer)
    assert_same(*optimizers)


@pytest.mark.parametrize(
    ("number", "case", "variant"),
    [(i, case, variant) for i, (case, variant, _) in enumerate(VARIANTS)],
    ids=IDS,
)
def test_every_rule_option_dtype_and_format_in_one_mixed_launch(number, case, variant):
    """Every weight and state format; sizes and the gradients' dtypes change with the variant."""
    sizes = [[SIZES[(i + j + number) % len(SIZES)] for j in (0, 4, 8)] for i in range(len(STORED))]
    grad_dtypes = [DTYPES[(i + number) % 3] for i in range(len(STORED)) for _ in sizes[i]]

    def build(backend):
        groups, params = [], []
        for (dtype, weights, states), shapes in zip(STORED, sizes, strict=True):
            states = states if served(variant, states) else "bf16"
            made = make_params(shapes, dtype, seed=number)
            groups.append({"params": made, "states": states, "weights": weights})
            params += made
        return params, case.ours(groups, **variant, backend=backend, seed=7)

    before = cuda_shim.launches()
    step_both(build, 2, grad_dtypes)
    assert cuda_shim.launches() == before + 4  # advance and sweep, of two steps


@pytest.mark.parametrize(("case", "variant", "name"), VARIANTS, ids=IDS)
def test_every_rule_and_option_in_a_list_of_fp32(case, variant, name):
    def build(backend):
        params = make_params([*SIZES, (CHUNK + 2085,)], torch.float32, seed=1)
        return params, case.ours(params, **variant, backend=backend, seed=3)

    step_both(build, 2, [torch.float32] * (len(SIZES) + 1))


@pytest.mark.parametrize(("dtype", "weights", "states"), STORED, ids=STORED_IDS)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion"])
def test_every_format_in_a_list_of_its_own(name, dtype, weights, states):
    """Those of combinations.h run a kernel of their own, the others the one for any list."""
    case = next(case for case in CASES if case.name == name)
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name == "sgd" else {})}
    sizes = [*SIZES, (2085,), (CHUNK + 300,)]

    def build(backend):
        params = make_params(sizes, dtype, seed=1)
        options["states"], options["weights"] = states, weights
        return params, case.ours(params, **options, backend=backend, seed=3)

    step_both(build, 2, [dtype] * len(sizes))


@pytest.mark.parametrize(("dtype", "weights", "states"), STORED, ids=STORED_IDS)
@pytest.mark.parametrize("first", [1, 8])
def test_misaligned_slices_write_nothing_beside_them(first, dtype, weights, states):
    """Whole warps take the wide path where everything is aligned, the narrow one elsewhere."""
    optimizers, storages = [], []
    for backend in ("reference", SHIM):
        storage = make_params([(2400,)], dtype, seed=5)[0].detach()
        params = [storage[first:1804].requires_grad_(), storage[1805:1808].requires_grad_()]
        optimizer = onepass.AdamW(
            params, lr=0.1, states=states, weights=weights, backend=backend, amsgrad=True
        )
        for step in range(2):
            set_grads(params, dtype, seed=step)
            optimizer.step()
        optimizers.append(optimizer)
        storages.append(storage)
    assert_same(*optimizers)
    assert same_bits(*storages)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(("dtype", "weights", "states"), STORED, ids=STORED_IDS)
def test_special_values(case, dtype, weights, states):
    """Denormals are kept, infinities and NaN travel as in the reference: every pair of them."""
    values = torch.tensor(SPECIAL)
    variant = last_variant(case, states)
    optimizers = []
    for backend in ("reference", SHIM):
        # Each value fills blocks, or a NaN would hide the others.
        param = torch.nn.Parameter(values.repeat_interleave(32 * len(values)).to(dtype))
        options = {**variant, "states": states, "weights": weights}
        optimizer = case.ours([param], **options, backend=backend)
        for _ in range(2):
            param.grad = values.repeat_interleave(32).repeat(len(values)).to(dtype)
            optimizer.step()
        optimizers.append(optimizer)
    assert_same(*optimizers)


def test_mx4_at_its_edges():
    assert_same(mx4_at_its_edges(SHIM), mx4_at_its_edges("reference"))


@pytest.mark.parametrize("states", STATE_FORMATS)
def test_a_mixed_list_of_groups_layouts_and_missing_gradients(states):
    def build(backend):
        generator = torch.Generator().manual_seed(3)
        storage = torch.randn(5000, generator=generator)
        half = torch.randn(5000, generator=generator).to(torch.bfloat16)
        params = [
            storage[1:1002].detach().requires_grad_(),
            half[3:1500].detach().requires_grad_(),
            torch.randn(4, 6, 5, 3, generator=generator)
            .to(memory_format=torch.channels_last)
            .requires_grad_(),
            torch.randn(40, 50, generator=generator).t().requires_grad_(),
            torch.randn(300, generator=generator).to(torch.float16).requires_grad_(),
        ]
        groups = [
            {"params": params[:2]},
            {"params": params[2:4], "states": "bf16", "lr": 0.03, "amsgrad": True},
            {"params": params[4:], "seed": 9, "decoupled_weight_decay": False},
        ]
        optimizer = onepass.AdamW(groups, lr=0.1, states=states, backend=backend)
        for step in range(4):
            set_grads(params, torch.float32 if step < 2 else torch.bfloat16, seed=step)
            # Another order of memory than the parameter's, a missing gradient, an expanded one.
            params[2].grad = params[2].grad.contiguous()
            params[0].grad = None if step % 2 else params[0].grad
            params[3].grad = torch.full((), 0.5).expand(50, 40)
            optimizer.step()
        return optimizer

    assert_same(build(SHIM), build("reference"))


@pytest.mark.parametrize("first", [0, 256, (1 << 32) - 704, (7 << 32) - 1024, (1 << 40) + 512])
@pytest.mark.parametrize("states", STATE_FORMATS)
def test_random_bits_of_a_shard_that_starts_anywhere(first, states):
    """Also across a multiple of 2^32, where the keys change."""
    first -= first % STATE_FORMATS[states].block
    found, expected = (step_of_shard(name, first, states) for name in (SHIM, "reference"))
    assert all(map(same_bits, found, expected))


# --- the norm --------------------------------------------------------------------------------


def norm_of(grads):
    entries = [
        Entry(
            torch.zeros_like(g), {}, STATE_FORMATS["fp32"], NATIVE[g.dtype], RULES["sgd"], 0, 0, i
        )
        for i, g in enumerate(grads)
    ]
    backend = BACKENDS[SHIM]
    prepared = backend.prepare(entries)
    params = [entry.param for entry in entries]
    assert backend.refresh(prepared, params, grads)
    found = backend.norm(prepared)
    assert same_bits(found.view(torch.int32), backend.norm(prepared).view(torch.int32))
    return found.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1])
def test_the_norm_of_odd_sizes_is_that_of_float64(dtype, first):
    params = make_params([*SIZES, (9 * CHUNK + 77,), (3,)], dtype, seed=1)
    grads = [p.detach().reshape(-1)[first:].clone() if first else p.detach() for p in params]
    if first:  # a slice that starts in the middle of 16 bytes
        grads[-2] = params[-2].detach()[first:]
    squares, largest, nonfinite = norm_of(grads)
    wide = torch.cat([g.double().reshape(-1) for g in grads])
    # Each of the sum's roundings is half an eps of a part of it, and there are few in a row.
    assert squares == pytest.approx(float((wide * wide).sum()), rel=1e-13)
    assert largest == float(wide.abs().max())
    assert nonfinite == 0


def test_the_norm_of_what_is_not_finite_and_of_what_overflows_fp32():
    fp32 = torch.tensor([1e30, -3e38, 0.0, 1e-45])
    squares, largest, nonfinite = norm_of([fp32])
    assert squares == pytest.approx(float((fp32.double() ** 2).sum()), rel=1e-15)
    assert (largest, nonfinite) == (float(fp32.abs().max()), 0)
    half = torch.tensor([float("nan"), -2.0, float("nan")], dtype=torch.float16)
    squares, largest, nonfinite = norm_of([half, torch.ones(3)])
    assert squares != squares
    assert (largest, nonfinite) == (2.0, 2)
    squares, largest, nonfinite = norm_of([torch.tensor([float("-inf"), 1.0]).bfloat16()])
    assert (squares, largest, nonfinite) == (float("inf"), float("inf"), 1)


# --- the plan --------------------------------------------------------------------------------


def test_what_is_launched_and_when_a_plan_is_stale():
    params = make_params([(5,), (4, 3)], torch.float32, 0)
    set_grads(params, torch.float32, 0)
    optimizer = onepass.AdamW(params, backend=SHIM)
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
    onepass.SGD(params, backend=SHIM).step()
    assert cuda_shim.launches() == before + 1  # advance


def test_a_list_of_two_rules_is_refused():
    entries = [
        Entry(torch.ones(3), {}, STATE_FORMATS["fp32"], 0, RULES["sgd"], 0, 0, 0),
        Entry(torch.ones(3), {0: torch.ones(3)}, STATE_FORMATS["fp32"], 0, RULES["lion"], 1, 0, 1),
    ]
    with pytest.raises(RuntimeError, match=r"must have the same rule.*\(parameter 1\)"):
        BACKENDS[SHIM].prepare(entries)


# --- who it serves ---------------------------------------------------------------------------


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


NO_CODE, OLD_DRIVER, NO_MEMORY = 209, 35, 2  # of cudaError_t


@pytest.fixture
def gpus(monkeypatch):
    """Sets the devices of the stand-in, which torch then reports as its GPUs."""

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
    assert backends.choose(torch.device("cuda", 0)).name == "triton"
    assert backends.choose(torch.device("cuda", 1)).name == "cuda"
    with pytest.raises(RuntimeError, match=r"ONEPASS_CUDA_ARCH=8\.6"):
        backends.choose(torch.device("cuda", 0), "cuda")
    assert cuda_shim.current_device() == 0


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
    """Pages, pieces of a parameter, and a norm over entries without states."""
    options = {name: value for name, value in options.items() if name != "ema_decay"}
    dtype = torch.bfloat16 if options.get("weights") else torch.float32
    found = []
    for backend, paged in (("reference", False), (SHIM, False), (SHIM, Paging(0, SMALLEST_PAGE))):
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
