"""The cpu backend returns the bits of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS

from .cases import (
    CASES,
    DTYPES,
    EVERY_FORMAT,
    FORMATS,
    IDS,
    SIZES,
    VARIANTS,
    assert_same,
    make_params,
    mx4_at_its_edges,
    same_bits,
    served,
    set_grads,
    step_of_shard,
)


def run(case, variant, backend, dtype, grad_dtype, states, steps=3, sizes=SIZES, weights="native"):
    params = make_params(sizes, dtype, seed=1)
    optimizer = case.ours(
        params, **variant, states=states, weights=weights, backend=backend, seed=7
    )
    for step in range(steps):
        set_grads(params, grad_dtype, seed=100 + step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("case", "variant", "name"), VARIANTS, ids=IDS)
def test_every_rule_option_dtype_format_and_odd_size(case, variant, name, every_isa):
    for dtype, grad_dtype, states in itertools.product(DTYPES, DTYPES, FORMATS):
        expected = run(case, variant, "reference", dtype, grad_dtype, states)
        for isa in every_isa:
            onepass.ops.cpu_isa(isa)
            found = run(case, variant, "cpu", dtype, grad_dtype, states)
            assert_same(found, expected)


# Short blocks, whole blocks, several tiles with a short block at the end.
BLOCK_SIZES = [(0,), (), (3,), (31, 33), (256,), (1025,)]


@pytest.mark.parametrize(
    ("case", "variant", "name"), [v for v in VARIANTS if not v[1]["maximize"]], ids=lambda v: v
)
def test_every_format_of_states_and_weights(case, variant, name, every_isa):
    for i, (states, weights, dtype) in enumerate(EVERY_FORMAT):
        if not served(variant, states):
            continue
        # Gradients of the weight's dtype, which the fused kernels want, and of others.
        for grad_dtype in {dtype} if i % 3 else {dtype, DTYPES[i // 3 % 3]}:
            how = (case, variant, dtype, grad_dtype, states, weights)
            expected = run_formats("reference", *how)
            for isa in every_isa:
                onepass.ops.cpu_isa(isa)
                assert_same(run_formats("cpu", *how), expected)


def run_formats(backend, case, variant, dtype, grad_dtype, states, weights):
    return run(case, variant, backend, dtype, grad_dtype, states, 2, BLOCK_SIZES, weights)


def test_mx4_at_its_edges(every_isa):
    expected = mx4_at_its_edges("reference")
    (param, _) = expected.param_groups[0]["params"]
    scales, ratio_scales = (expected.state[param][f"{n}_scale"] for n in ("exp_avg_sq", "exp_avg"))
    assert (scales >= 132).any()  # roots in fine codes, and in coarse ones
    assert ((scales > 0) & (scales < 132)).any()
    assert (ratio_scales == 254).any()
    for isa in every_isa:
        onepass.ops.cpu_isa(isa)
        assert_same(mx4_at_its_edges("cpu"), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("states", FORMATS)
def test_large_tensors_over_several_threads(case, states, every_isa):
    variant = next(case.variants())
    sizes = [(65537,), (5,), (3, 70001), (131072,)]
    for dtype in (torch.float32, torch.bfloat16):
        expected = run(case, variant, "reference", dtype, dtype, states, 2, sizes)
        for isa in every_isa:
            onepass.ops.cpu_isa(isa)
            assert_same(run(case, variant, "cpu", dtype, dtype, states, 2, sizes), expected)


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e-39, 1.2e-38, 6e-8, 6e-5, 65504.0, 65520.0, 1e30]
SPECIAL += [3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 1.0, 1.0 + 2**-9, -1.5]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_special_values(case, every_isa):
    """Denormals are kept, infinities and NaN travel as in the reference: every pair of them."""
    values = torch.tensor(SPECIAL)
    weight = values.repeat_interleave(len(values))
    grad = values.repeat(len(values))
    plain = [(states, "native", dtype) for dtype in DTYPES for states in FORMATS]
    for i, variant in enumerate(case.variants()):
        formats = plain if i else EVERY_FORMAT
        for states, weights, dtype in formats:
            special_values(case, variant, dtype, states, weights, weight, grad, every_isa)


def special_values(case, variant, dtype, states, weights, weight, grad, every_isa):
    results = []
    for backend, isa in [("reference", "auto"), *(("cpu", isa) for isa in every_isa)]:
        onepass.ops.cpu_isa(isa)
        param = torch.nn.Parameter(weight.to(dtype, copy=True))
        optimizer = case.ours([param], **variant, states=states, weights=weights, backend=backend)
        for _ in range(2):
            param.grad = grad.to(dtype)
            optimizer.step()
        results.append(optimizer)
    for found in results[1:]:
        assert_same(found, results[0])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("states", FORMATS)
def test_a_mixed_list(case, states, every_isa):
    """Dtypes, gradient dtypes, groups with options of their own, misaligned and permuted memory."""

    def build(backend):
        generator = torch.Generator().manual_seed(3)
        storage = torch.randn(5000, generator=generator)
        half = torch.randn(5000, generator=generator).to(torch.bfloat16)
        params = [
            storage[1:1002].detach().requires_grad_(),
            storage[1003:1004].detach().requires_grad_(),
            half[3:2004].detach().requires_grad_(),
            torch.randn(4, 6, 5, 3, generator=generator)
            .to(memory_format=torch.channels_last)
            .requires_grad_(),
            torch.randn(40, 50, generator=generator).t().requires_grad_(),
            torch.randn(300, generator=generator).to(torch.float16).requires_grad_(),
        ]
        variants = list(case.variants())
        groups = [
            {"params": params[:3], **variants[0]},
            {"params": params[3:5], **variants[-1], "states": "bf16", "lr": 0.03},
            {"params": params[5:], **variants[len(variants) // 2], "seed": 9},
        ]
        optimizer = case.ours(groups, states=states, backend=backend)
        for step in range(4):
            set_grads(params, torch.float32, seed=step)
            # Another order of memory than the parameter's, a missing gradient, an expanded one.
            params[3].grad = params[3].grad.contiguous()
            params[1].grad = None if step % 2 else params[1].grad
            params[4].grad = torch.full((), 0.5).expand(50, 40)
            optimizer.step()
        return optimizer

    expected = build("reference")
    for isa in every_isa:
        onepass.ops.cpu_isa(isa)
        assert_same(build("cpu"), expected)


@pytest.mark.parametrize("before", [0, 32, 704, 1024])  # elements until a multiple of 2^32
@pytest.mark.parametrize("states", STATE_FORMATS)
def test_random_bits_of_a_shard_that_starts_anywhere(before, states, every_isa):
    """Also across a multiple of 2^32, where the keys change: inside a tile as well."""
    block = STATE_FORMATS[states].block
    first = (3 << 32) - -(-before // block) * block
    expected = step_of_shard("reference", first, states)
    for isa in every_isa:
        onepass.ops.cpu_isa(isa)
        assert all(map(same_bits, step_of_shard("cpu", first, states), expected))


def test_bits_do_not_depend_on_the_number_of_threads(every_isa):
    case = next(c for c in CASES if c.name == "adamw")
    variant = next(case.variants())
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            run(case, variant, "cpu", torch.bfloat16, torch.bfloat16, "bf16", 2, [(200003,), (7,)])
        )
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_denormals_are_kept_under_set_flush_denormal():
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    param = torch.nn.Parameter(torch.full((5000,), 1e-39))
    param.grad = torch.full((5000,), 1e-41)
    optimizer = onepass.SGD([param], lr=1.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        optimizer.step()
        flushing = bool((torch.tensor(1e-39) * 1 == 0).item())
    finally:
        torch.set_flush_denormal(False)
    assert flushing, "the setting must have been in force, and still be after the step"
    assert bool((param.detach() == torch.tensor(1e-39) - torch.tensor(1e-41)).all())
