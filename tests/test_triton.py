"""The triton backend returns the bits of the reference, interpreted on CPU tensors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.formats.floats import decode_bf16, decode_fp16, encode_bf16, encode_fp16

from .cases import (
    CASES,
    DTYPES,
    EVERY_FORMAT,
    FORMATS,
    SIZES,
    assert_same,
    make_params,
    mx4_at_its_edges,
    same_bits,
    served,
    set_grads,
    step_of_shard,
)
from .test_bits import SPECIAL
from .test_reference import NEAR_TIES

tl = pytest.importorskip("triton.language")

WHY_NOT = BACKENDS["triton"].unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

# Whether it maximizes is a factor in the table of numbers: either will do for a kernel.
VARIANTS = [
    (case, variant, f"{case.name}-{i}")
    for case in CASES
    for i, variant in enumerate(case.variants())
    if variant["maximize"] == (i // 2 % 2 == 1)
]
COMBINATIONS = list(itertools.product(DTYPES, DTYPES, FORMATS))


def step_both(build, steps, grad_dtypes):
    """Runs an optimizer on both backends and compares them; build(backend) -> (params, it)."""
    optimizers = []
    for backend in ("reference", "triton"):
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
    ids=[name for _, _, name in VARIANTS],
)
def test_every_rule_option_dtype_and_format_in_one_mixed_launch(number, case, variant):
    """Two sizes a combination, others for the next variant: the interpreter is slow."""
    sizes = [[SIZES[(i + j + number) % len(SIZES)] for j in (0, 4)] for i in range(18)]
    grad_dtypes = [g for i, (_, g, _) in enumerate(COMBINATIONS) for _ in sizes[i]]

    def build(backend):
        groups, params = [], []
        for (dtype, _, states), shapes in zip(COMBINATIONS, sizes, strict=True):
            made = make_params(shapes, dtype, seed=number)
            groups.append({"params": made, "states": states})
            params += made
        return params, case.ours(groups, **variant, backend=backend, seed=7)

    step_both(build, 2, grad_dtypes)


# Blocks of 32 and 256 that are short, whole, and of which one byte has half an element.
BLOCK_SIZES = [(), (3,), (31,), (33,), (7, 37), (1023,), (1025,), (2049,)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("which", [0, -1])
def test_every_format_of_states_and_weights(case, which):
    """One size of every pair of formats, in one launch: the interpreter is slow."""
    variant = list(case.variants())[which]
    formats = [row for row in EVERY_FORMAT if served(variant, row[0])]
    sizes = [BLOCK_SIZES[(3 * i + 5 + which) % 8] for i in range(len(formats))]
    grad_dtypes = [DTYPES[(i + which) % 3] for i in range(len(formats))]

    def build(backend):
        groups, params = [], []
        for (states, weights, dtype), shape in zip(formats, sizes, strict=True):
            made = make_params([shape], dtype, seed=len(params))
            groups.append({"params": made, "states": states, "weights": weights})
            params += made
        return params, case.ours(groups, **variant, backend=backend, seed=7)

    step_both(build, 2, grad_dtypes)


@pytest.mark.parametrize("states", ["mx8", "mx4", "dynamic8"])
@pytest.mark.parametrize("weights", ["native", "split8", "master"])
@pytest.mark.parametrize("first", [0, 1])
def test_block_formats_over_several_chunks(states, weights, first):
    """Whole blocks of both widths without a mask, and misaligned weights."""

    def build(backend):
        storage = make_params([(20001,)], torch.bfloat16, seed=5)[0].detach()
        params = [storage[first:18004].requires_grad_(), storage[18008:20001].requires_grad_()]
        options = {"states": states, "weights": weights, "amsgrad": True}
        return params, onepass.AdamW(params, lr=0.1, **options, backend=backend)

    step_both(build, 2, [torch.bfloat16, torch.float32])


def test_mx4_at_its_edges():
    assert_same(mx4_at_its_edges("triton"), mx4_at_its_edges("reference"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(("dtype", "states"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_every_odd_size_in_an_unmixed_launch(case, dtype, states):
    *_, variant = case.variants()

    def build(backend):
        params = make_params(SIZES, dtype, seed=1)
        return params, case.ours(params, **variant, states=states, backend=backend, seed=3)

    step_both(build, 2, [dtype] * len(SIZES))


@pytest.mark.parametrize(("dtype", "states"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("first", [0, 1])
def test_several_chunks_aligned_and_misaligned(dtype, states, first):
    """Whole blocks take the unmasked path where everything is aligned, the masked one elsewhere."""

    def build(backend):
        storage = make_params([(20001,)], dtype, seed=5)[0].detach()
        params = [storage[first:18004].requires_grad_(), storage[18005:18008].requires_grad_()]
        return params, onepass.AdamW(params, lr=0.1, states=states, backend=backend)

    step_both(build, 2, [dtype, dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_special_values(case):
    """Denormals are kept, infinities and NaN travel as in the reference: every pair of them."""
    values = torch.tensor(SPECIAL)
    variants = list(case.variants())
    for variant, dtype, states in itertools.product((variants[0], variants[-1]), DTYPES, FORMATS):
        optimizers = []
        for backend in ("reference", "triton"):
            param = torch.nn.Parameter(values.repeat_interleave(len(values)).to(dtype))
            optimizer = case.ours([param], **variant, states=states, backend=backend)
            for _ in range(2):
                param.grad = values.repeat(len(values)).to(dtype)
                optimizer.step()
            optimizers.append(optimizer)
        assert_same(*optimizers)


@pytest.mark.parametrize("states", FORMATS)
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

    assert_same(build("triton"), build("reference"))


@pytest.mark.parametrize("first", [0, 5, (1 << 32) - 700, (7 << 32) - 1024, (1 << 40) + 3])
def test_random_bits_of_a_shard_that_starts_anywhere(first):
    """Also across a multiple of 2^32, where the keys change."""
    found, expected = (step_of_shard(name, first, "bf16") for name in ("triton", "reference"))
    assert all(map(same_bits, found, expected))


def test_codes_of_both_16_bit_formats():
    """Every rounding decision, without a rule in between."""
    import triton
    from onepass.triton_kernels import formats

    if not triton.knobs.runtime.interpret:
        pytest.skip("the kernels are compiled here: tests/test_triton_gpu.py runs them")

    kernel = triton.jit(_round_trip)
    block = 1 << 17
    values = np.zeros(-(-len(NEAR_TIES) // block) * block, np.float32)
    values[: len(NEAR_TIES)] = NEAR_TIES
    for format_, encode, decode in (
        (formats.FORMATS[1], encode_bf16, decode_bf16),
        (formats.FORMATS[2], encode_fp16, decode_fp16),
    ):
        assert format_.element == tl.uint16
        source, decoded = torch.from_numpy(values.copy()), torch.empty(len(values))
        codes = torch.empty(len(values), dtype=torch.int16)
        with np.errstate(all="ignore"):
            kernel[(len(values) // block,)](source, codes, decoded, FORMAT=format_, BLOCK=block)
            expected = encode(values)
            numbers = decode(expected)
        nan = np.isnan(values)
        np.testing.assert_array_equal(codes.numpy().view(np.uint16)[~nan], expected[~nan])
        np.testing.assert_array_equal(decoded.numpy(), numbers)


def _round_trip(source_ptr, codes_ptr, decoded_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes, _ = FORMAT.encode(tl.load(source_ptr + offsets), 0, 0, 0)
    tl.store(codes_ptr + offsets, codes.to(tl.int16, bitcast=True))
    tl.store(decoded_ptr + offsets, FORMAT.decode(codes, 0, 0, 0))
