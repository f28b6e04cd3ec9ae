"""Every target returns the bits of the reference, for every rule, option, format and layout.

GPUs, and `make test-all`, run every rule with every combination of formats. `make test` runs every
pair of a rule and a state format, of a rule and a weight format, and of a state format and a weight
format on each target of tests/support/targets.py.
"""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import (
    CASES,
    DTYPES,
    EVERY_FORMAT,
    FORMATS,
    KERNEL_VARIANTS,
    SIZES,
    SPECIAL,
    assert_same,
    last_variant,
    make_params,
    mx4_at_its_edges,
    served,
    set_grads,
    some_formats,
    step_of_shard,
)
from .support.comparison import params_of, states_of
from .support.targets import REFERENCE, STAND_IN, TARGETS, compare, other_targets, with_rows

WEIGHTS = [(name, dtype) for name, form in WEIGHT_FORMATS.items() for dtype in form.codes]
# Each state format and each weight format at least once, in as few rows as possible.
FEW_FORMATS = [
    (tuple(STATE_FORMATS)[i % len(STATE_FORMATS)], *weight) for i, weight in enumerate(WEIGHTS)
]
# Number of elements that one thread block (cuda) or one program (triton) updates.
CUDA_CHUNK, TRITON_CHUNK = 16384, 8192


def format_id(states, weights, dtype):
    return f"{str(dtype).removeprefix('torch.')}-{weights}-{states}"


def take_steps(optimizer, grad_dtypes, steps):
    for step in range(steps):
        for i, (param, dtype) in enumerate(zip(params_of(optimizer), grad_dtypes, strict=True)):
            set_grads([param], dtype, seed=1000 * step + i)
        optimizer.step()
    return optimizer


# --- rules, options, formats -----------------------------------------------------------------


def mixed_list(target, number, formats, sizes):
    """Steps one optimizer with a group for each combination of formats.

    Each group has gradients of each dtype.

    Args:
        number: index of the rule and its options in KERNEL_VARIANTS.
        formats: indices of EVERY_FORMAT.
        sizes: number of parameters in a group.
    """
    case, variant, _ = KERNEL_VARIANTS[number]
    groups, grad_dtypes = [], []
    for i in formats:
        states, weights, dtype = EVERY_FORMAT[i]
        shapes = [SIZES[(i + 4 * j + number) % len(SIZES)] for j in range(sizes)]
        params = make_params(shapes, dtype, seed=i, device=target.device)
        groups.append({"params": params, "states": states, "weights": weights})
        grad_dtypes += [DTYPES[(i + j + number) % 3] for j in range(sizes)]
    optimizer = case.ours(groups, **variant, backend=target.backend, seed=7)
    return take_steps(optimizer, grad_dtypes, 2)


def mixed_rows(target):
    """Rows of KERNEL_VARIANTS with the formats that they run with.

    A GPU runs every variant with every combination of formats. On a CPU, each variant of a rule has
    a part of the combinations. The interpreter runs each weight format once per rule.
    """
    chosen = {number: [] for number in range(len(KERNEL_VARIANTS))}
    for c, case in enumerate(CASES):
        numbers = [n for n, row in enumerate(KERNEL_VARIANTS) if row[0] is case]
        for i, (states, _, _) in enumerate(EVERY_FORMAT):
            able = [n for n in numbers if served(KERNEL_VARIANTS[n][1], states)]
            if target.interpreted:
                able = [min(able, key=lambda n: len(chosen[n]))] if i in some_formats(c) else []
            elif target.device == "cpu":
                able = [n for n in able if i in some_formats(n)]
            for n in able:
                chosen[n].append(i)
        # A rule can have more variants than combinations in the interpreter.
        for n in numbers:
            if not chosen[n]:
                states = (states for states, _, _ in EVERY_FORMAT)
                chosen[n] = [
                    next(i for i, s in enumerate(states) if served(KERNEL_VARIANTS[n][1], s))
                ]
    for number, formats in chosen.items():
        name = KERNEL_VARIANTS[number][2]
        yield name, (number, tuple(formats), 1 if target.interpreted else 3)


@with_rows("number,formats,sizes", mixed_rows)
def test_rules_options_and_formats_in_one_mixed_list(target, number, formats, sizes):
    compare(target, mixed_list, number, formats, sizes)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_rows_have_every_pair_of_rule_and_formats(target):
    rules, pairs, variants = set(), set(), set()
    for _, (number, formats, _) in mixed_rows(target):
        variants |= {number} if formats else set()
        for states, *weight in (EVERY_FORMAT[i] for i in formats):
            rules |= {(KERNEL_VARIANTS[number][0].name, part) for part in (states, tuple(weight))}
            pairs.add((states, *weight))
    assert rules == {(case.name, part) for case in CASES for part in (*STATE_FORMATS, *WEIGHTS)}
    assert pairs == set(EVERY_FORMAT)
    assert variants == set(range(len(KERNEL_VARIANTS)))


def special_pairs(dtype, repeats=32):
    """A weight and a gradient that contain every pair of special values.

    Each value fills whole blocks, because a NaN would hide the other values of its block.
    """
    values = torch.tensor(SPECIAL)
    weight = values.repeat_interleave(repeats * len(values)).to(dtype)
    return weight, values.repeat_interleave(repeats).repeat(len(values)).to(dtype)


# Options for which every combination of formats has a kernel: kReducedPrecision in csrc/rules.
OPTIONS = {case.name: {"lr": 0.01, "weight_decay": 0.1, **case.base} for case in CASES}
OPTIONS["sgd"]["momentum"] = 0.9


def own_list(target, name, format_, sizes, steps):
    """Steps one optimizer whose parameters all have one format; some values are special."""
    case = next(case for case in CASES if case.name == name)
    states, weights, dtype = format_
    weight, grad = (tensor.to(target.device) for tensor in special_pairs(dtype))
    params = make_params(sizes, dtype, seed=1, device=target.device)
    params.append(torch.nn.Parameter(weight))
    formats = {"states": states, "weights": weights}
    optimizer = case.ours(params, **OPTIONS[name], **formats, backend=target.backend, seed=3)
    for step in range(steps):
        set_grads(params[:-1], dtype, seed=100 + step)
        params[-1].grad = grad
        optimizer.step()
    return optimizer


def own_rows(target):
    """Every rule with every combination of formats on a GPU, and with some of them on a CPU.

    The stand-in runs only the rules that have kernels for single formats. The interpreter runs one
    rule with each combination of formats.
    """
    sizes, steps = (*SIZES, (2085,)), 20 if target.device == "cuda" else 2
    on_stand_in = ("sgd", "adam", "adamw", "lion")
    for i, format_ in enumerate(EVERY_FORMAT):
        for c, case in enumerate(CASES):
            chosen = target.device == "cuda" or i in some_formats(c)
            if target.interpreted:
                chosen, sizes = c == i % len(CASES), ()
            elif target.name == STAND_IN:
                chosen = chosen and case.name in on_stand_in
            if chosen:
                yield f"{case.name}-{format_id(*format_)}", (case.name, format_, sizes, steps)


@with_rows("name,format_,sizes,steps", own_rows)
def test_lists_of_one_format_with_special_values(target, name, format_, sizes, steps):
    """Denormals are kept, and infinities and NaN are where the reference has them."""
    compare(target, own_list, name, format_, sizes, steps)


def special_list(target, number):
    """Steps an optimizer with special values in each dtype, in state formats without blocks."""
    case, variant, _ = KERNEL_VARIANTS[number]
    groups, grads = [], []
    for dtype in DTYPES:
        weight, grad = (tensor.to(target.device) for tensor in special_pairs(dtype, 1))
        for states in FORMATS:
            groups.append({"params": [torch.nn.Parameter(weight.clone())], "states": states})
            grads.append(grad)
    optimizer = case.ours(groups, **variant, backend=target.backend)
    for _ in range(2):
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer


def special_rows(target):
    for number, (case, _, name) in enumerate(KERNEL_VARIANTS):
        last = max(n for n, row in enumerate(KERNEL_VARIANTS) if row[0] is case)
        if not target.interpreted or number == last:
            yield name, (number,)


@with_rows("number", special_rows)
def test_special_values_with_every_option(target, number):
    compare(target, special_list, number)


@other_targets
def test_mx4_at_its_edges(target):
    assert_same(
        mx4_at_its_edges(target.backend, target.device), mx4_at_its_edges(REFERENCE.backend)
    )


def test_the_edges_of_mx4_are_reached():
    optimizer = mx4_at_its_edges(REFERENCE.backend)
    param = params_of(optimizer)[0]
    scales, ratio_scales = (optimizer.state[param][f"{n}_scale"] for n in ("exp_avg_sq", "exp_avg"))
    assert (scales >= 132).any()  # blocks of roots with fine codes, and with coarse codes
    assert ((scales > 0) & (scales < 132)).any()
    assert (ratio_scales == 254).any()


# --- sizes and layouts -----------------------------------------------------------------------


def long_list(target, number, format_, size):
    """Steps a parameter of several chunks; `number` selects the rule and the gradient dtype."""
    case = CASES[number % len(CASES)]
    states, weights, dtype = format_
    params = make_params([(size,), (5,)], dtype, seed=1, device=target.device)
    options = {**last_variant(case, states), "states": states, "weights": weights}
    optimizer = case.ours(params, **options, backend=target.backend, seed=5)
    return take_steps(optimizer, [dtype, DTYPES[number % 3]], 2)


def long_rows(target):
    size = 2 * TRITON_CHUNK + 3617 if target.interpreted else 65537
    for i, format_ in enumerate(FEW_FORMATS):
        yield format_id(*format_), (i, format_, size)


@with_rows("number,format_,size", long_rows)
def test_long_parameters(target, number, format_, size):
    compare(target, long_list, number, format_, size)


def misaligned_slices(target, format_):
    """Steps parameters that start 1 or 8 elements into a storage; returns storages and states."""
    states, weights, dtype = format_
    found = []
    for first in (1, 8):
        storage = make_params([(2400,)], dtype, seed=5, device=target.device)[0].detach()
        params = [storage[first:1804].requires_grad_(), storage[1805:1808].requires_grad_()]
        options = {"states": states, "weights": weights, "amsgrad": True}
        optimizer = onepass.AdamW(params, lr=0.1, **options, backend=target.backend)
        take_steps(optimizer, [dtype, DTYPES[first % 3]], 2)
        found += [storage, *(s for param in params for s in states_of(optimizer, param))]
    return found


def slice_rows(target):
    for format_ in FEW_FORMATS if target.interpreted else EVERY_FORMAT:
        yield format_id(*format_), (format_,)


@with_rows("format_", slice_rows)
def test_misaligned_slices_write_nothing_beside_them(target, format_):
    compare(target, misaligned_slices, format_)


def layouts(target, number, states, steps):
    """Steps groups with different options whose parameters are misaligned or permuted.

    One gradient is expanded, one has another memory order than its parameter, and one is missing in
    every second step.
    """
    case, generator = CASES[number], torch.Generator().manual_seed(3)
    storage, half = (torch.randn(5000, generator=generator).to(target.device) for _ in range(2))
    half = half.to(torch.bfloat16)
    four, two, one = (torch.randn(s, generator=generator) for s in ((4, 6, 5, 3), (40, 50), (300,)))
    params = [
        storage[1:1002],
        storage[1003:1004],
        half[3:2004],
        four.to(target.device).to(memory_format=torch.channels_last),
        two.to(target.device).t(),
        one.to(target.device, torch.float16),
    ]
    params = [param.detach().requires_grad_() for param in params]
    variants = [v for v in case.variants() if served(v, states)]
    groups = [
        {"params": params[:3], **variants[0]},
        {"params": params[3:5], **variants[-1], "states": "bf16", "lr": 0.03},
        {"params": params[5:], **variants[len(variants) // 2], "seed": 9},
    ]
    optimizer = case.ours(groups, states=states, backend=target.backend)
    for step in range(steps):
        set_grads(params, torch.float32 if step < steps // 2 else torch.bfloat16, seed=step)
        params[3].grad = params[3].grad.contiguous()  # another memory order than the parameter
        params[1].grad = None if step % 2 else params[1].grad
        params[4].grad = torch.full((), 0.5, device=target.device).expand(50, 40)
        optimizer.step()
    return optimizer


def layout_rows(target):
    formats = tuple(STATE_FORMATS)
    for i, case in enumerate(CASES):
        for states in (formats[i % len(formats)], formats[(i + 2) % len(formats)]):
            yield f"{case.name}-{states}", (i, states, 2 if target.interpreted else 4)
            if target.interpreted:
                break


@with_rows("number,states,steps", layout_rows)
def test_a_mixed_list_of_groups_layouts_and_missing_gradients(target, number, states, steps):
    compare(target, layouts, number, states, steps)


def shard(target, first, states):
    return step_of_shard(target.backend, first, states, target.device)


# First elements of shards. The keys of the random bits change at each multiple of 2^32 elements.
STARTS = [5, (3 << 32) - 32, (3 << 32) - 704, (7 << 32) - 1024, (1 << 40) + 515]


@pytest.mark.parametrize("first", STARTS)
@pytest.mark.parametrize("states", STATE_FORMATS)
@other_targets
def test_random_bits_of_a_shard_that_starts_anywhere(target, first, states):
    compare(target, shard, first - first % STATE_FORMATS[states].block, states)


# --- the cpu backend -------------------------------------------------------------------------


def test_bits_do_not_depend_on_the_number_of_threads(every_isa):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = make_params([(200003,), (7,)], torch.bfloat16, seed=1)
        optimizer = onepass.AdamW(params, lr=0.01, states="bf16", backend="cpu", seed=7)
        found.append(take_steps(optimizer, [torch.bfloat16] * 2, 2))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


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
