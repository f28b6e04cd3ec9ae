"""Exchange of state dicts with recorded runs of bitsandbytes, and with the package if installed."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

import onepass
from onepass.checkpoints.bitsandbytes import NESTED
from onepass.formats.dynamic8 import dynamic_map

from .bitsandbytes_record import OPTIONS, PATH, SHAPES, STEPS, record, set_grads, values
from .cases import assert_same, clone, make_params, same_bits, train

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not INSTALLED, reason="bitsandbytes is not installed: its recorded runs are tested"
)
RUNS = torch.load(PATH, weights_only=True)
OURS = {name: getattr(onepass, name.removesuffix("8bit")) for name in OPTIONS}


@pytest.fixture(params=["recorded", pytest.param("live", marks=needs_bitsandbytes)])
def run_of(request):
    return RUNS.__getitem__ if request.param == "recorded" else record


def flat(state):
    """The state of one parameter in a bitsandbytes state dict, without its nesting."""
    return {**{k: v for k, v in state.items() if k != NESTED}, **state.get(NESTED, {})}


def loaded(name, run, states="dynamic8", **options):
    params = [torch.nn.Parameter(weight.clone()) for weight in run["weights"]]
    groups = [{"params": params[:1]}, {"params": params[1:], "states": "fp32"}]
    optimizer = OURS[name](groups, lr=123.0, states=states, **options)
    state_dict = onepass.from_bitsandbytes(optimizer, in_two_groups(run["state_dict"]))
    optimizer.load_state_dict(state_dict)
    return params, optimizer


def in_two_groups(state_dict):
    (group,) = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**group, "params": [0]}, {**group, "params": [1]}]}


def test_the_record_names_its_version():
    assert RUNS["version"] == "0.50.2"
    assert set(RUNS) == {"version", "torch", *OPTIONS}


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes_within_rounding(signed, run_of):
    held = flat(run_of("AdamW8bit")["state_dict"]["state"][0])
    theirs = held["qmap1" if signed else "qmap2"]
    ours = torch.tensor(dynamic_map(signed))
    assert (theirs - ours).abs().max() <= 1e-7
    assert (ours.diff() > 1e-7).all()  # the tolerance tells neighbouring codes apart


@pytest.mark.parametrize("name", OPTIONS)
def test_import_keeps_the_codes(name, run_of):
    run = run_of(name)
    params, optimizer = loaded(name, run)
    for i, param in enumerate(params):
        theirs, state = flat(run["state_dict"]["state"][i]), optimizer.state[param]
        assert state["step"] == STEPS
        for n, name in enumerate(optimizer.rule.bitsandbytes.states, 1):
            # A tuple of keys is one tensor of bitsandbytes that stacks several states.
            keys = [name] if isinstance(name, str) else name
            for k, key in enumerate(keys):
                part = ... if isinstance(name, str) else k
                assert same_bits(state[key], theirs[f"state{n}"][part])
                if i == 0:
                    assert state[key].dtype == torch.uint8
                    assert same_bits(state[f"{key}_scale"], theirs[f"absmax{n}"][part])


def assert_same_step(found, expected, before):
    """Asserts that two weights differ by no more than a few roundings.

    onepass and bitsandbytes order the arithmetic differently, so the update and the weight round
    differently. The test compares one step only: neighbouring codes after it would make later steps
    differ by more.
    """
    limit = 1e-5 * (expected - before).abs() + 2**-22 * before.abs()
    assert ((found - expected).abs() <= limit).all()
    assert ((expected - before).abs() > 100 * limit).float().mean() > 0.9


@pytest.mark.parametrize("name", OPTIONS)
def test_onepass_continues_a_run_of_bitsandbytes(name, run_of):
    run = run_of(name)
    params, optimizer = loaded(name, run)
    assert optimizer.param_groups[0]["lr"] == OPTIONS[name]["lr"]
    assert optimizer.param_groups[0]["weight_decay"] == OPTIONS[name]["weight_decay"]
    set_grads(params, STEPS)
    optimizer.step()
    for param, before, after in zip(params, run["weights"], run["after"], strict=True):
        assert_same_step(param.detach(), after, before)


@pytest.mark.parametrize("name", OPTIONS)
def test_export_is_the_inverse_of_import(name, run_of):
    run = run_of(name)
    _, optimizer = loaded(name, run)
    exported = onepass.to_bitsandbytes(optimizer)
    for i in range(len(SHAPES)):
        theirs, ours = flat(run["state_dict"]["state"][i]), exported["state"][i]
        assert theirs.keys() == ours.keys()
        assert theirs["step"] == ours["step"]
        for key in theirs.keys() - {"step"}:
            limit = 1e-7 if key.startswith("qmap") else 0
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=limit)
    for group in exported["param_groups"]:
        assert {**group, "params": [0, 1]} == run["state_dict"]["param_groups"][0]


@needs_bitsandbytes
@pytest.mark.parametrize("name", OPTIONS)
def test_bitsandbytes_continues_a_run_of_onepass(name):
    import bitsandbytes

    params = [torch.nn.Parameter(values(shape, i)) for i, shape in enumerate(SHAPES)]
    decoupled = name in ("Adam8bit", "AdamW8bit", "Lion8bit")
    options = {**OPTIONS[name], "decoupled_weight_decay": decoupled}
    ours = OURS[name](params, **options, states="dynamic8")
    for step in range(STEPS):
        set_grads(params, step)
        ours.step()
    there = clone(params)
    theirs = getattr(bitsandbytes.optim, name)(there, **{**OPTIONS[name], "lr": 123.0})
    theirs.load_state_dict(onepass.to_bitsandbytes(ours))
    before = clone(params)
    for optimizer, ps in ((ours, params), (theirs, there)):
        set_grads(ps, STEPS)
        optimizer.step()
    for p, q, start in zip(params, there, before, strict=True):
        assert_same_step(p.detach(), q.detach(), start.detach())


@pytest.mark.parametrize("states", ["fp32", "mx8", "mx4", "bf16"])
def test_codes_are_converted_to_any_other_format(states):
    run = RUNS["AdamW8bit"]
    _, exact = loaded("AdamW8bit", run, states="fp32")
    params, optimizer = loaded("AdamW8bit", run, states=states)
    wide = onepass.convert_state_dict(optimizer, optimizer.state_dict(), states="fp32")
    largest = {"fp32": 1e-30, "bf16": 2**-8, "mx8": 0.07, "mx4": 0.7}[states]
    for p, q in zip(exact.param_groups[0]["params"], params, strict=False):
        for key in ("exp_avg", "exp_avg_sq"):
            want, got = exact.state[p][key], wide["state"][0][key]
            assert (want - got).abs().max() <= largest * want.abs().max()
        assert optimizer.state[q]["step"] == STEPS


def test_blocks_of_2048_become_blocks_of_256():
    param = torch.nn.Parameter(torch.zeros(2500))
    optimizer = onepass.Lion([param], states="dynamic8")
    codes = (torch.arange(2500) % 256).to(torch.uint8)
    state = {"step": 4, "state1": codes, "absmax1": torch.tensor([2.0, 3.0])}
    state["qmap1"] = torch.tensor(dynamic_map(signed=True))
    groups = [{"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 0.0, "params": [0]}]
    old = {"state": {0: state}, "param_groups": groups}
    optimizer.load_state_dict(onepass.from_bitsandbytes(optimizer, old))
    assert torch.equal(optimizer.state[param]["exp_avg"], codes)
    assert optimizer.state[param]["exp_avg_scale"].tolist() == [2.0] * 8 + [3.0] * 2


def test_codes_are_reordered_for_another_memory_layout():
    """bitsandbytes stores codes in index order, onepass in memory order."""
    shape = (2, 40, 5, 3)
    params = make_params([shape], torch.float32, 1)
    flat_run = onepass.Lion(params, states="dynamic8")
    train(flat_run, params, 2)
    exported = onepass.to_bitsandbytes(flat_run)
    last = torch.nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
    other = onepass.Lion([last], states="dynamic8")
    other.load_state_dict(onepass.from_bitsandbytes(other, exported))
    back = onepass.to_bitsandbytes(other)["state"][0]
    assert back["state1"].is_contiguous()

    def decoded(state):
        values = torch.tensor(dynamic_map(signed=True))[state["state1"].flatten().long()]
        return values * state["absmax1"].repeat_interleave(256)[: values.numel()]

    want, got = decoded(exported["state"][0]), decoded(back)
    # Two roundings, each within half of the widest gap of the map, relative to the block maximum.
    assert (want - got).abs().max() <= 0.02 * want.abs().max()
    assert not torch.equal(other.state[last]["exp_avg"].flatten(), back["state1"].flatten())


def test_invalid_state_dicts_are_refused_before_anything_changes():
    run = RUNS["AdamW8bit"]
    params, optimizer = loaded("AdamW8bit", run)
    before = copy.deepcopy(optimizer)

    def changed(number, **entries):
        state_dict = copy.deepcopy(in_two_groups(run["state_dict"]))
        state = flat(state_dict["state"][number])
        state.update(entries)
        state_dict["state"][number] = {k: v for k, v in state.items() if v is not None}
        return state_dict

    theirs = flat(run["state_dict"]["state"][0])
    for state_dict, message in [
        (changed(0, state1=None), "parameter 0 has state2: adam has 2 state"),
        (changed(0, state1=None, state2=None), "no state1: this is not a state dict of bits"),
        (changed(0, qmap1=theirs["qmap2"]), "qmap1 of state1 .* must be the dynamic map of bits"),
        (changed(0, absmax2=torch.ones(3)), r"absmax2 of state2 .* shape \(2,\).*got \(3,\)"),
        (changed(0, absmax2=None), "absmax2 and qmap2 are needed"),
        (changed(0, state1=theirs["state1"].double()), "must be uint8 or float32; got torch.fl"),
        (changed(0, state1=torch.zeros(10, 30, dtype=torch.uint8).t()), "must be contiguous"),
        (changed(1, state1=torch.ones(8)), r"exp_avg of parameter 1 .* is \(8,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(onepass.from_bitsandbytes(optimizer, state_dict))
        assert_same(optimizer, before)
    lion = onepass.Lion(params)
    with pytest.raises(ValueError, match="state1 and state2: lion has 1 state"):
        onepass.from_bitsandbytes(lion, run["state_dict"])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (onepass.AdamW, {"amsgrad": True}, "amsgrad of parameter group 0 must be False"),
        (onepass.AdamW, {"maximize": True}, "maximize"),
        (onepass.Adam, {"weight_decay": 0.1}, "decoupled_weight_decay .* must be True"),
        (onepass.SGD, {}, "momentum of parameter group 0 must be > 0"),
        (onepass.SGD, {"momentum": 0.9, "nesterov": True}, "nesterov"),
        (onepass.SGD, {"momentum": 0.9, "dampening": 0.1}, "dampening .* must be 0, .*got 0.1"),
        (onepass.RMSprop, {"centered": True}, "centered"),
        (onepass.Adagrad, {"lr_decay": 0.1}, "lr_decay"),
    ],
)
def test_export_refuses_options_that_bitsandbytes_lacks(cls, options, message):
    optimizer = cls(make_params([(5,)], torch.float32, 1), **options)
    with pytest.raises(ValueError, match=message):
        onepass.to_bitsandbytes(optimizer)
