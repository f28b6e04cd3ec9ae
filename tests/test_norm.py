"""The global norm of the gradients, on every target that runs on CPU tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS, Entry, StepArgs
from onepass.formats import NATIVE, STATE_FORMATS
from onepass.rules import HYPER_WIDTH, RULES

from .cases import DTYPES, SIZES, same_bits
from .support.targets import on_targets

CPU = torch.device("cpu")
# Relative error of the sum of squares, derived in the docstrings of the backends. The reference
# adds fewer than 2^20 elements here, in float64. The CUDA kernels also add in float64, with few
# additions in sequence.
BOUNDS = {"cpu": 20 * 2**-24, "triton": 9 * 2**-24, "reference": 2.0**-33, "cuda": 1e-13}


on_each = on_targets(lambda target: target.device == "cpu")


@pytest.fixture
def backend(target):
    return BACKENDS[target.backend]


def stateless(params):
    form, rule = STATE_FORMATS["fp32"], RULES["sgd"]
    return [Entry(p, {}, form, NATIVE[p.dtype], rule, 1, 0, i) for i, p in enumerate(params)]


def prepare(backend, grads):
    """A plan that has read the gradients; the caller must keep them alive."""
    params = [torch.zeros_like(grad) for grad in grads]
    prepared = backend.prepare(stateless(params))
    assert backend.refresh(prepared, params, grads)
    return prepared


def norm(backend, grads):
    result = backend.norm(prepare(backend, grads))
    assert (result.shape, result.dtype, result.device) == ((3,), torch.float64, grads[0].device)
    return result


def exact(grads):
    """The sum of squares, rounded once, and the largest magnitude.

    Squares of fp32 values are exact in float64.
    """
    values = np.concatenate([g.cpu().double().reshape(-1).numpy() for g in grads])
    return math.fsum(values * values), float(np.abs(values).max(initial=0.0))


def close(backend, grads):
    squares, largest, nonfinite = norm(backend, grads).tolist()
    expected, expected_largest = exact(grads)
    assert abs(squares - expected) <= BOUNDS[backend.name] * expected
    assert largest == expected_largest
    assert nonfinite == 0


def mixed(sizes, scale=1.0, seed=0):
    """Gradients of each dtype in turn; fp16 limits the scale to 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for i, size in enumerate(sizes):
        dtype = DTYPES[i % 3]
        factor = min(max(scale, 1e-3), 1e3) if dtype == torch.float16 else scale
        grads.append((torch.randn(size, generator=generator) * factor).to(dtype))
    return grads


# From denormals to the largest fp32 number; squares at both ends do not fit fp32.
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-22, 1e-3, 1.0, 1e15, 1e22, 5e37])
@on_each
def test_every_dtype_size_and_magnitude(target, backend, scale):
    close(backend, mixed([*SIZES, *SIZES[1:], *SIZES[2:], (20001,), (5, 4099)], scale))


@on_each
def test_magnitudes_that_differ_within_one_tensor(target, backend):
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-140, 126, (30_000,), generator=generator)
    values = torch.ldexp(torch.randn(30_000, generator=generator), exponents)
    close(backend, [values, values.bfloat16(), torch.full((7,), 1e-30)])
    close(backend, [values.sort().values])
    close(backend, [torch.tensor([3.4028234663852886e38, 1e-45, -3.4028234663852886e38])])


@pytest.mark.parametrize("dtype", DTYPES)
@on_each
def test_misaligned_and_permuted_memory(target, backend, dtype):
    storage = torch.randn(40_000).to(dtype)
    for first in (0, 1, 3, 8):
        close(backend, [storage[first : first + 20_000], storage[first + 20_000 : 30_007]])
    close(backend, [storage[:400].view(20, 20).t(), storage[1:1].view(0)])


@on_each
def test_no_elements_at_all(target, backend):
    assert norm(backend, [torch.zeros(0), torch.zeros(3, 0)]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 9000])
@on_each
def test_elements_that_are_not_finite_are_counted(target, backend, dtype, size):
    """Infinity is the largest magnitude and NaN is ignored; sums become inf or NaN as usual."""
    inf, nan = math.inf, math.nan
    others = [torch.full((100,), -2.0), torch.full((3,), 0.5, dtype=torch.float16)]
    for value, places, squares, largest in (
        (inf, [0], inf, inf),
        (-inf, [size - 1], inf, inf),
        (nan, [size // 2], nan, 3.0),
        (nan, list(range(size)), nan, 2.0),
    ):
        grad = torch.full((size,), 3.0, dtype=dtype)
        grad[places] = value
        expected = 2.0 if value != value and size == 1 else largest
        found = norm(backend, [others[0], grad, others[1]]).tolist()
        np.testing.assert_array_equal(found, [squares, expected, len(set(places))])
    grad = torch.tensor([inf, nan, -inf] * size, dtype=dtype)
    np.testing.assert_array_equal(norm(backend, [grad]).tolist(), [nan, inf, 3 * size])


@on_each
def test_nothing_is_changed_and_the_plan_stays_ready(target, backend):
    results = []
    for asked in (False, True):
        params, grads = mixed([(300,), (7,), (0,)], seed=2), mixed([(300,), (7,), (0,)], seed=3)
        before = [grad.clone() for grad in grads]
        prepared = backend.prepare(stateless(params))
        with pytest.raises(RuntimeError, match="norm without refresh"):
            backend.norm(prepared)
        assert backend.refresh(prepared, params, grads)
        if asked:
            assert same_bits(backend.norm(prepared).float(), backend.norm(prepared).float())
        hyper = torch.zeros(1, HYPER_WIDTH)
        hyper[0, :2] = torch.tensor([1.0, 0.5])
        backend.run(prepared, StepArgs(hyper, torch.tensor([[0, 1]])))
        with pytest.raises(RuntimeError, match="norm without refresh"):
            backend.norm(prepared)
        assert all(map(same_bits, grads, before))
        results.append(params)
    assert all(map(same_bits, *results))
    assert not torch.equal(results[0][0], mixed([(300,)], seed=2)[0])


@on_each
def test_the_same_bits_run_after_run(target, backend):
    grads = mixed([(50_000,), (3,), (20_000,), (999,)])
    prepared = prepare(backend, grads)
    first = backend.norm(prepared)
    assert all(torch.equal(backend.norm(prepared), first) for _ in range(5))


def test_threads_and_instruction_sets_change_no_bit(every_isa):
    grads = mixed([(300_001,), (3,), (200_000,), (70_007,), (0,), *[(5,)] * 3000])
    found = []
    for isa in every_isa:
        onepass.ops.cpu_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(norm(BACKENDS["cpu"], grads))
    assert all(torch.equal(result, found[0]) for result in found)
    close(BACKENDS["cpu"], grads)


def test_denormals_count_under_set_flush_denormal():
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    grads = [torch.full((5000,), 2.0**-140)]
    prepared = prepare(BACKENDS["cpu"], grads)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = BACKENDS["cpu"].norm(prepared)
    finally:
        torch.set_flush_denormal(False)
    squares, largest, _ = found.tolist()
    assert (squares, largest) == (5000 * 2.0**-280, 2.0**-140)


def test_more_chunks_than_programs(monkeypatch):
    """A program takes several chunks in turn, whose dtypes may differ."""
    backend = BACKENDS["triton"]
    if why_not := backend.unavailable(CPU):
        pytest.skip(why_not)
    import triton.language as tl

    from onepass.triton_kernels import norm as kernels

    for programs in (1, 4):
        monkeypatch.setattr(kernels, "PROGRAMS", tl.constexpr(programs))
        close(backend, mixed([(n,) for n in (20_000, 5, 9000, 8192, 17, 30_000, 1)]))
