"""Conversion between formats: state dicts, runs that change their format, other memory layouts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CASES, assert_same, clone, make_params, same_bits, set_grads, train
from .test_checkpoints import contiguous, make_layouts, save_and_load

BF16 = torch.bfloat16
PAIRS = list(itertools.product(STATE_FORMATS, repeat=2))
COMPANIONS = [name for name, form in WEIGHT_FORMATS.items() if form.key]


def wide(optimizer):
    """The states as fp32 values; convert_state_dict decodes them without rounding."""
    return onepass.convert_state_dict(optimizer, optimizer.state_dict(), states="fp32")["state"]


def largest(values, block):
    """For each element, the largest magnitude in its block."""
    padded = torch.zeros(-(-len(values) // block) * block)
    padded[: len(values)] = values.abs()
    return padded.view(-1, block).amax(1).repeat_interleave(block)[: len(values)]


def limits(states, first, second, stored_second):
    """The largest errors of a state format for Adam's moments, with elements in memory order."""
    if states in ("fp32", "bf16"):
        eps = 2**-8 if states == "bf16" else 0.0
        return eps * first.abs(), eps * second
    block = STATE_FORMATS[states].block
    if states == "dynamic8":  # the widest gap of the map is 0.0142
        return 0.0072 * largest(first, block), 0.0072 * largest(second, block)
    # Half of the spacing of codes with b bits of mantissa is 2^-(b + 1) of the value. First moments
    # are lifted by the lowest power of two of their block before they are encoded.
    if states == "mx8":
        half = 1.01 / 16
        first_limit = half * (first.abs() + 2**-14 * largest(first, block))
        return first_limit, half * second + 2**-29 * largest(second, block)  # the lowest code
    half, root = 1.01 / 4, second.sqrt()
    off = half * root + 2**-6 * largest(root, block)
    stored = stored_second.sqrt()
    ratio = torch.where(stored > 0, first / stored, 0.0)
    unit = ratio.abs() + largest(ratio, block) / 4
    return half * unit * stored, (root + off) ** 2 - second


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_states_come_within_the_target_formats_error(source, target):
    """A checkpoint in the layouts of make_layouts is loaded into a contiguous model."""
    params = make_layouts(torch.float32)
    first = onepass.AdamW(params, states=source)
    train(first, params, 4)
    second = onepass.AdamW(contiguous(params), states=target)
    second.load_state_dict(save_and_load(first.state_dict()))
    want, got = wide(first), wide(second)
    for i in range(len(params)):
        assert got[i]["step"] == 4
        moments = [
            state[key].contiguous().flatten()
            for state in (want[i], got[i])
            for key in ("exp_avg", "exp_avg_sq")
        ]
        bounds = limits(target, moments[0], moments[1], moments[3])
        for value, found, bound in zip(moments[:2], moments[2:], bounds, strict=True):
            assert ((found - value).abs() <= bound).all(), i
    if source == target == "fp32" or source == target == "bf16":
        for key in ("exp_avg", "exp_avg_sq"):
            assert all(same_bits(want[i][key], got[i][key]) for i in range(len(params)))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_whose_states_change_their_format_goes_on(source, target):
    """The result is the same as saving and loading into an optimizer of the other format."""
    params = make_layouts(torch.float32)
    optimizer = onepass.AdamW(params, states=source)
    train(optimizer, params, 3)
    loaded = onepass.AdamW(clone(params), states=target)
    loaded.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["states"] = target
    for one in (optimizer, loaded):
        train(one, one.param_groups[0]["params"], 1, start=3)
    assert_same(optimizer, loaded)
    form = STATE_FORMATS[target]
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == form.dtype
        assert ("exp_avg_scale" in state) == (form.scale is not None)


@pytest.mark.parametrize("states", STATE_FORMATS)
def test_a_weight_may_move_to_another_layout(states):
    """Loading reorders the states for the new layout; their values stay the same."""
    params = make_layouts(torch.float32)
    optimizer = onepass.AdamW(params, states=states)
    train(optimizer, params, 3)
    before = wide(optimizer)
    for param in params:
        param.data = param.detach().clone(memory_format=torch.contiguous_format)
    optimizer.load_state_dict(optimizer.state_dict())
    after = wide(optimizer)
    for i in range(len(params)):
        moments = [
            state[key].contiguous().flatten()
            for state in (before[i], after[i])
            for key in ("exp_avg", "exp_avg_sq")
        ]
        bounds = limits(states, moments[0], moments[1], moments[3])
        for value, found, bound in zip(moments[:2], moments[2:], bounds, strict=True):
            assert ((found - value).abs() <= bound).all(), i
        assert "stride" not in optimizer.state[params[i]]


def test_a_step_finds_that_a_weight_has_moved():
    """The shape of packed codes does not show their order, so the state stores the stride."""
    moved, loaded = make_layouts(torch.float32), make_layouts(torch.float32)
    optimizers = [onepass.AdamW(params, states="mx4") for params in (moved, loaded)]
    for optimizer, params in zip(optimizers, (moved, loaded), strict=True):
        train(optimizer, params, 3)
        assert optimizer.state[params[5]]["stride"] == params[5].stride()
        for param in params:
            param.data = param.detach().clone(memory_format=torch.contiguous_format)
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    for optimizer, params in zip(optimizers, (moved, loaded), strict=True):
        train(optimizer, params, 1, start=3)
    assert_same(*optimizers)
    assert not any("stride" in state for state in optimizers[0].state.values())


def test_one_element_has_the_same_shapes_in_mx8_and_mx4():
    """Only the dtypes of the codes tell the two formats apart."""
    for source, target in (("mx8", "mx4"), ("mx4", "mx8")):
        (param,) = params = make_params([(1,)], torch.float32, 1)
        optimizer = onepass.Lion(params, states=source)
        param.grad = torch.tensor([0.75])
        optimizer.step()
        value = wide(optimizer)[0]["exp_avg"].item()
        saved = optimizer.state_dict()
        optimizer.param_groups[0]["states"] = target
        param.grad = torch.zeros(1)
        optimizer.step()
        assert 0.7 * value < wide(optimizer)[0]["exp_avg"].item() < 1.3 * value
        other = onepass.Lion(params, states=target)
        other.load_state_dict(saved)
        assert 0.7 * value < wide(other)[0]["exp_avg"].item() < 1.3 * value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("states", STATE_FORMATS)
def test_states_of_torch_optim_on_16_bit_weights(states, dtype):
    """torch.optim stores states in the dtype of the weight."""
    params = [torch.nn.Parameter(torch.ones(40, dtype=dtype))]
    theirs = torch.optim.AdamW(params)
    set_grads(params, dtype, 1)
    params[0].grad = params[0].grad.clamp(0.01)
    theirs.step()
    ours = onepass.AdamW(params, states=states)
    ours.load_state_dict(theirs.state_dict())
    want, got = theirs.state_dict()["state"][0], wide(ours)[0]
    assert want["exp_avg"].dtype == dtype
    moments = [state[key].float() for state in (want, got) for key in ("exp_avg", "exp_avg_sq")]
    bounds = limits(states, moments[0], moments[1], moments[3])
    for value, found, bound in zip(moments[:2], moments[2:], bounds, strict=True):
        assert ((found - value).abs() <= bound).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.torch], ids=lambda c: c.name)
@pytest.mark.parametrize("states", ["mx8", "mx4", "dynamic8"])
def test_a_converted_state_dict_loads_in_torch_optim(case, states):
    options = {"momentum": 0.9} if case.name == "sgd" else {}
    params = make_params([(40,), (7,)], torch.float32, 1)
    ours = case.ours(params, states=states, **options)
    train(ours, params, 3)
    held = copy.deepcopy(ours)
    state_dict = onepass.convert_state_dict(ours, ours.state_dict(), "fp32", "native")
    assert_same(held, ours)
    theirs = case.torch(clone(params), **options)
    theirs.load_state_dict(save_and_load(state_dict))
    for i, param in enumerate(theirs.param_groups[0]["params"]):
        for key, value in state_dict["state"][i].items():
            assert torch.equal(theirs.state[param][key], value)
    train(theirs, theirs.param_groups[0]["params"], 1, start=3)


def test_convert_state_dict_keeps_groups_and_refuses_what_does_not_fit():
    norm, weight = make_params([(3,)], torch.float32, 1) + make_params([(40,)], BF16, 1)
    groups = [{"params": [norm], "weights": "native", "states": "fp32"}, {"params": [weight]}]
    optimizer = onepass.AdamW(groups, states="mx8", weights="split8")
    train(optimizer, [norm, weight], 2)
    saved = optimizer.state_dict()
    again = onepass.convert_state_dict(optimizer, saved)
    assert [group.get("states") for group in again["param_groups"]] == [None, "mx8"]
    for i in range(2):
        for key, value in saved["state"][i].items():
            assert torch.equal(value, again["state"][i][key])
            assert value.data_ptr() != again["state"][i][key].data_ptr()
    other = onepass.convert_state_dict(optimizer, saved, states="bf16", weights="master")
    assert [group.get("weights") for group in other["param_groups"]] == [None, "master"]
    assert other["state"][0]["exp_avg"].dtype == other["state"][1]["exp_avg"].dtype == BF16
    full = onepass.engine.state_conversion.full_precision(weight, saved["state"][1])
    assert torch.equal(other["state"][1]["weight_master"], full)
    for arguments, message in [
        ({"states": "mx6"}, "states must be one of 'fp32'.*got 'mx6'"),
        ({"weights": "mastery"}, "weights must be one of .*got 'mastery'"),
    ]:
        with pytest.raises(ValueError, match=message):
            onepass.convert_state_dict(optimizer, saved, **arguments)
    half = onepass.SGD(make_params([(3,)], torch.float16, 1))
    with pytest.raises(
        ValueError, match=r"split16.* is for bfloat16 weights; a parameter of \(3,\)"
    ):
        onepass.convert_state_dict(half, half.state_dict(), weights="split16")


# --- companions of weights ---

# The relative error of a conversion: one fp32 ulp at a tie; the compensation of kahan has 8 bits
# below the 8 of the weight; split8 has 24 bits in all, and is off by half a step more next to a
# tie.
LOST = {"master": 2**-23, "split16": 2**-23, "kahan": 2**-16, "split8": 2**-14}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(COMPANIONS, repeat=2)))
def test_companions_come_within_the_target_formats_error(source, target):
    """Some values are midway between two weights, where formats round to different weights."""
    params = make_params([(1 << 14,)], BF16, 1)
    optimizer = onepass.SGD(params, lr=1e-2, weights=source)
    train(optimizer, params, 2)
    # A step of zero, from masters at ties and just below, so that every format encodes them itself.
    first = onepass.SGD(params, lr=0.0, weights="master")
    train(first, params, 1)
    master = first.state[params[0]]["weight_master"]
    bits = master.view(torch.int32)
    bits[0::4] = bits[0::4] & -65536 | 0x8000
    bits[1::4] = bits[1::4] & -65536 | 0x7FC0
    params[0].data = ((bits + 0x8000) >> 16).to(torch.int16).view(BF16)
    optimizer = onepass.SGD(params, lr=0.0, weights=source)
    optimizer.load_state_dict(first.state_dict())
    train(optimizer, params, 1)
    weight = params[0].detach().clone()

    saved = optimizer.state_dict()
    loaded = onepass.SGD(params, lr=0.0, weights=target)
    loaded.load_state_dict(saved)
    want = onepass.engine.state_conversion.full_precision(params[0], saved["state"][0])
    got = onepass.engine.state_conversion.full_precision(params[0], loaded.state_dict()["state"][0])
    assert ((got - want).abs() <= LOST[target] * want.abs()).all()
    if source == target:
        assert torch.equal(got, want)
    assert torch.equal(params[0], weight)
    # The same conversion during a run.
    optimizer.param_groups[0]["weights"] = target
    for one in (optimizer, loaded):
        params[0].data = weight.clone()
        train(one, params, 1, start=1)
    assert_same(optimizer, loaded)


def test_a_run_may_add_and_drop_a_companion():
    params = make_params([(50,)], BF16, 1)
    optimizer = onepass.AdamW(params)
    train(optimizer, params, 1)
    for weights, key in [
        ("split8", "weight_low"),
        ("kahan", "weight_compensation"),
        ("native", ""),
    ]:
        optimizer.param_groups[0]["weights"] = weights
        train(optimizer, params, 1, start=1)
        found = {name for name in optimizer.state[params[0]] if name.startswith("weight_")}
        assert found == ({key} if key else set())
