"""Saving and loading: resumed runs, exchange with torch.optim, and invalid state dicts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS, VERSION

from .cases import (
    CASES,
    EVERY_FORMAT,
    SHAPES,
    VARIANTS,
    assert_same,
    clone,
    make_params,
    same_bits,
    served,
    train,
)
from .support.thorough import THOROUGH
from .test_oracle import TWIN_IDS, TWINS, torch_twin


def save_and_load(state_dict):
    """Saves and loads with torch.save and torch.load, as for a checkpoint file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STEPS = 5 if THOROUGH else 2


# Every variant with one state format, and so every rule with every state format: a rule has more
# variants than there are state formats. `make test-all` runs every variant with all of them.
RESUMED = [
    pytest.param(case, variant, states, id=f"{name}-{states}")
    for i, (case, variant, name) in enumerate(VARIANTS)
    for j, states in enumerate(STATE_FORMATS)
    if THOROUGH or (i + j) % len(STATE_FORMATS) == 0
]


@pytest.mark.parametrize(("case", "variant", "states"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(case, variant, states):
    if not served(variant, states):
        with pytest.raises(ValueError, match="centered=True needs"):
            case.ours(make_params(SHAPES, torch.float32, 1), **variant, states=states)
        return
    params = make_params(SHAPES, torch.float32, 1)
    whole = case.ours(params, **variant, states=states, seed=3)
    train(whole, params, STEPS)
    saved, weights = save_and_load(whole.state_dict()), clone(params)
    train(whole, params, STEPS, start=STEPS)

    resumed = case.ours(weights, lr=123.0, states=states)
    resumed.load_state_dict(saved)
    train(resumed, weights, STEPS, start=STEPS)
    assert_same(resumed, whole)


LAYOUTS = [(33,), (), (1,), (0,), (300,), (4, 9), (2, 5, 3, 4)]


def make_layouts(dtype):
    """Parameters with incomplete blocks, one or no element, no dimension, or permuted strides."""
    params = make_params(LAYOUTS, dtype, 1)
    params[5].data = params[5].detach().t().contiguous().t()
    params[6].data = params[6].detach().to(memory_format=torch.channels_last)
    return params


def contiguous(params):
    return [
        torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params
    ]


@pytest.mark.parametrize(("states", "weights", "dtype"), EVERY_FORMAT)
def test_a_run_resumes_with_every_format_in_every_layout(states, weights, dtype):
    options = {"states": states, "weights": weights, "seed": 3}
    params = make_layouts(dtype)
    whole = onepass.AdamW(params, **options)
    train(whole, params, 3)
    saved, at = save_and_load(whole.state_dict()), save_and_load([p.detach() for p in params])
    train(whole, params, 3, start=3)
    weights_again = [torch.nn.Parameter(p) for p in at]
    assert [p.stride() for p in weights_again] == [p.stride() for p in params]
    resumed = onepass.AdamW(weights_again, **options)
    resumed.load_state_dict(saved)
    train(resumed, weights_again, 3, start=3)
    assert_same(resumed, whole)


@pytest.mark.parametrize(("states", "weights", "dtype"), EVERY_FORMAT)
def test_copies_hold_states_and_companions(states, weights, dtype):
    params = make_layouts(dtype)
    optimizer = onepass.AdamW(params, states=states, weights=weights)
    train(optimizer, params, 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(optimizer, params, 2, start=2)
    for copied in copies:
        train(copied, [p for g in copied.param_groups for p in g["params"]], 2, start=2)
        assert_same(copied, optimizer)


@pytest.mark.parametrize(("case", "variant", "name"), TWINS, ids=TWIN_IDS)
def test_a_torch_run_continues_in_onepass_and_back(case, variant, name):
    params = make_params(SHAPES, torch.float32, 1)
    theirs = torch_twin(case, variant, params)
    train(theirs, params, 3)

    here = clone(params)
    ours = case.ours(here, lr=0.5)
    ours.load_state_dict(save_and_load(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == variant["lr"]
    train(theirs, params, 3, start=3)
    train(ours, here, 3, start=3)
    for p, q in zip(params, here, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    back = clone(here)
    again = case.torch(back, lr=0.5)
    again.load_state_dict(save_and_load(ours.state_dict()))
    train(ours, here, 3, start=6)
    train(again, back, 3, start=6)
    for p, q in zip(here, back, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_step_counters_of_a_state_dict_are_separate():
    """torch.optim increments each counter, so a shared one would count once per parameter."""
    params = make_params([(3,), (4,)], torch.float32, 1)
    optimizer = onepass.AdamW(params)
    train(optimizer, params, 2)
    steps = [s["step"] for s in optimizer.state_dict()["state"].values()]
    assert steps[0].data_ptr() != steps[1].data_ptr()
    assert [s.item() for s in steps] == [2.0, 2.0]


def test_loading_copies_and_converts_to_the_optimizers_own_format():
    params = make_params([(100,)], torch.bfloat16, 1)
    first = onepass.AdamW(params)
    train(first, params, 3)
    saved = first.state_dict()
    second = onepass.AdamW(params, states="bf16")
    second.load_state_dict(saved)
    state = second.state[params[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert second.param_groups[0]["states"] == "bf16"
    assert same_bits(state["exp_avg"], saved["state"][0]["exp_avg"].to(torch.bfloat16))
    third = onepass.AdamW(params)
    third.load_state_dict(saved)
    moments = third.state[params[0]]["exp_avg"]
    assert moments.dtype == torch.float32  # torch.optim would cast it to the weight's bf16
    assert moments.data_ptr() != saved["state"][0]["exp_avg"].data_ptr()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pickle_and_deepcopy(case):
    variant = list(case.variants())[-1]
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = case.ours(params, **variant, backend="reference")
    train(optimizer, params, 2)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.backend == "reference"
        theirs = [p for g in copied.param_groups for p in g["params"]]
        assert all(p is not q for p, q in zip(params, theirs, strict=True))
        mine = copy.deepcopy(optimizer)
        for one in (mine, copied):
            train(one, [p for g in one.param_groups for p in g["params"]], 2, start=2)
        assert_same(mine, copied)


def test_state_dicts_that_do_not_fit_are_refused_before_anything_changes():
    params = make_params([(5,), (6, 4)], torch.float32, 1)
    optimizer = onepass.AdamW(params)
    train(optimizer, params, 1)
    held = copy.deepcopy(optimizer.state_dict())

    other = make_params([(5,), (7, 4)], torch.float32, 1)
    another_model = onepass.AdamW(other)
    train(another_model, other, 1)
    another_kind = onepass.Lion(params)
    train(another_kind, params, 1)
    lost = copy.deepcopy(held)
    del lost["state"][1]["exp_avg_sq"]
    bad_option = copy.deepcopy(held)
    bad_option["param_groups"][0]["eps"] = -1.0
    fewer = onepass.AdamW(params[:1]).state_dict()
    newer = copy.deepcopy(held)
    newer["param_groups"][0]["format_version"] = VERSION + 1
    bare = copy.deepcopy(held)
    bare["state"][1]["exp_avg"] = torch.zeros(6, 4, dtype=torch.uint8)
    two_groups = onepass.AdamW([{"params": params[:1]}, {"params": params[1:]}]).state_dict()
    for state_dict, message in [
        (another_model.state_dict(), r"exp_avg of parameter 1 of shape \(6, 4\) is \(7, 4\)"),
        (another_kind.state_dict(), "no exp_avg_sq for parameter 0"),
        (lost, "no exp_avg_sq for parameter 1"),
        (bad_option, "eps must be"),
        (newer, f"version {VERSION + 1}; this version of onepass reads version {VERSION}"),
        (bare, "exp_avg of parameter 1 .* is torch.uint8 without a scale"),
        (fewer, "parameter group 0 has 1 parameters in the state dict, 2 in the optimizer"),
        (two_groups, "has 2 parameter groups, the optimizer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        now = optimizer.state_dict()
        assert now["param_groups"] == held["param_groups"]
        for i, state in held["state"].items():
            assert all(torch.equal(state[key], now["state"][i][key]) for key in state)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 33, (6, 5)])
def test_state_dicts_of_versions_2_and_3_load(size, version):
    """In version 2 the codes of mx4 were uint8, as those of mx8 still are. Codes of version 3 have
    not changed since."""
    for states in ("mx8", "mx4"):
        sizes = [size if isinstance(size, tuple) else (size,)]
        params = make_params(sizes, torch.float32, 0)
        optimizer = onepass.AdamW(params, states=states)
        train(optimizer, params, 2)
        older = copy.deepcopy(optimizer.state_dict())
        older["param_groups"][0]["format_version"] = version
        for state in older["state"].values() if version == 2 else ():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].view(torch.uint8)
        loaded = onepass.AdamW(params, states=states)
        loaded.load_state_dict(older)
        assert_same(optimizer, loaded)


def test_dtypes_tell_every_format():
    forms = STATE_FORMATS.values()
    assert len({(form.dtype, form.scale) for form in forms}) == len(forms)


def test_version_1_state_dicts_load_except_mx4():
    for states in ("fp32", "bf16", "mx8", "mx4", "dynamic8"):
        params = make_params([(6, 4)], torch.float32, 0)
        optimizer = onepass.AdamW(params, states=states)
        train(optimizer, params, 1)
        older = copy.deepcopy(optimizer.state_dict())
        older["param_groups"][0]["format_version"] = 1
        if states == "mx4":
            with pytest.raises(
                ValueError, match="group 0 of the state dict has mx4 states of version 1;"
            ):
                optimizer.load_state_dict(older)
        else:
            optimizer.load_state_dict(older)
            named = optimizer.state_dict()["param_groups"][0]
            assert named.get("format_version") == (None if states == "fp32" else VERSION)
