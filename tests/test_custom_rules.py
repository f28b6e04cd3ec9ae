"""Custom rules: results, formats, resuming, paging, ranks, and errors in definitions."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import onepass
from onepass.__main__ import main
from onepass.engine.backends import BACKENDS
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules import Flag, Option, ScalarState, Slot
from onepass.rules.option_checks import check_real

from . import zero_ranks
from .cases import assert_same, make_params, same_bits, set_grads
from .support.custom_rules import (
    ADABELIEF,
    SIGNUM,
    AdaBelief,
    Float64,
    Signum,
    signum,
    trains_sharded,
)

pytestmark = pytest.mark.filterwarnings("ignore:the rule .* runs in NumPy")

CPU = torch.device("cpu")
SHAPES = [(1,), (33,), (3, 5), (1025,)]
OPTIONS = {
    "signum": [{"beta": 0.8}],
    "adabelief": [
        {"highest": highest, "decoupled_weight_decay": decoupled}
        for highest, decoupled in itertools.product((False, True), repeat=2)
    ],
}
CASES = [
    (cls, {"lr": 1e-2, "weight_decay": 0.1, **options})
    for cls in (Signum, AdaBelief)
    for options in OPTIONS[cls.rule.name]
]
IDS = [f"{cls.__name__}-{i}" for i, (cls, _) in enumerate(CASES)]


def train(cls, options, steps=3, dtype=torch.float32, start=0, params=None, optimizer=None):
    if params is None:
        params = make_params(SHAPES, dtype, 1)
    if optimizer is None:
        optimizer = cls(params, **options)
    for number in range(start, start + steps):
        set_grads(params, dtype, number)
        optimizer.step()
    return params, optimizer


# --- results ---


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_one_step_is_within_2_eps_of_float64_and_100_steps_within_3e_5(cls, options):
    params = make_params([(1000,)], torch.float32, 1)
    (param,) = params
    optimizer = cls(params, **options)
    group = {**optimizer.param_groups[0], "decoupled_weight_decay": cls.rule.decoupled, **options}
    oracle = Float64(param, group)
    before = oracle.p.clone()
    eps = torch.finfo(torch.float32).eps
    for number in range(100):
        set_grads(params, torch.float32, number)
        getattr(oracle, cls.rule.name)(param.grad)
        optimizer.step()
        if number == 0:
            scale = torch.maximum(oracle.p.abs(), before.abs()).clamp_min(options["lr"])
            assert ((param.double() - oracle.p).abs() / scale).max() <= 2 * eps
    error = (param.double() - oracle.p).norm() / (oracle.p - before).norm()
    assert error < 3e-5


@pytest.mark.parametrize("states", STATE_FORMATS)
@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_triton_returns_the_bits_of_the_reference_in_every_state_format(cls, options, states):
    if why_not := BACKENDS["triton"].unavailable(CPU):
        pytest.skip(why_not)
    options = {**options, "states": states}
    params, optimizer = train(cls, {**options, "backend": "triton"})
    expected, reference = train(cls, {**options, "backend": "reference"})
    assert_same(optimizer, reference)
    assert all(map(same_bits, params, expected))


@pytest.mark.parametrize("weights", [name for name in WEIGHT_FORMATS if name != "native"])
def test_triton_returns_the_bits_of_the_reference_in_every_weight_format(weights):
    if why_not := BACKENDS["triton"].unavailable(CPU):
        pytest.skip(why_not)
    options = {"lr": 1e-2, "weights": weights, "states": "mx8", "max_grad_norm": 1.0}
    bf16 = torch.bfloat16
    params, optimizer = train(AdaBelief, {**options, "backend": "triton"}, dtype=bf16)
    expected, reference = train(AdaBelief, {**options, "backend": "reference"}, dtype=bf16)
    assert_same(optimizer, reference)
    assert all(map(same_bits, params, expected))


def test_check_rule_finds_where_triton_and_numpy_differ():
    if why_not := BACKENDS["triton"].unavailable(CPU):
        pytest.skip(why_not)
    onepass.check_rule(SIGNUM)
    onepass.check_rule(ADABELIEF)

    def other(param, grad, states, h, flags):
        lr, weight_decay, beta = h
        exp_avg = beta * states[0] + (1 - beta) * grad
        return param - lr * np.sign(exp_avg) - weight_decay * param, (exp_avg,)

    with pytest.raises(ValueError, match=r"rule 'signum': the weight of step 1 differs for weight"):
        onepass.check_rule(replace(SIGNUM, update=other))


def test_tiles_of_a_large_parameter_have_the_bits_of_small_ones(monkeypatch):
    from onepass.engine.backends import reference

    for states in ("mx8", "mx4", "dynamic8"):
        found = []
        for tile in (1 << 16, 512):
            monkeypatch.setattr(reference, "TILE", tile)
            params = make_params([(3, 1001)], torch.bfloat16, 1)
            options = {"states": states, "weights": "split8", "ema_decay": 0.9}
            found.append(train(AdaBelief, options, dtype=torch.bfloat16, params=params))
        assert_same(found[0][1], found[1][1])
        assert same_bits(found[0][0][0], found[1][0][0])


# --- saving, skipping, ranks, backends ---


@pytest.mark.parametrize("states", STATE_FORMATS)
def test_a_run_resumes_bit_for_bit(states, tmp_path):
    options = {"lr": 1e-2, "highest": True, "states": states}
    params, optimizer = train(AdaBelief, options, 4)
    others, half = train(AdaBelief, options, 2)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = AdaBelief(others, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(AdaBelief, options, 2, start=2, params=others, optimizer=resumed)
    assert_same(optimizer, resumed)
    assert all(map(same_bits, params, others))


@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_paged_states_have_the_same_bits(states):
    options = {"lr": 1e-2, "states": states}
    params, optimizer = train(AdaBelief, {**options, "paged": True})
    expected, plain = train(AdaBelief, options)
    assert_same(optimizer, plain)
    assert all(map(same_bits, params, expected))


def test_a_class_is_pickled_with_its_states():
    _, optimizer = train(AdaBelief, {"lr": 1e-2})
    copy = pickle.loads(pickle.dumps(optimizer))
    assert type(copy) is AdaBelief
    assert_same(copy, optimizer)


def test_skipping_leaves_scalar_states():
    params, optimizer = train(AdaBelief, {"skip_nonfinite": True}, 1)
    before = optimizer.state[params[0]]["beta1_product"].clone()
    set_grads(params, torch.float32, 1)
    params[1].grad[3] = float("nan")
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["beta1_product"], before)
    assert float(before) == pytest.approx(0.9)


@pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed here")
def test_two_ranks_of_fsdp2_train_as_one_process(tmp_path):
    found = zero_ranks.run(2, [trains_sharded], tmp_path)
    why = found[trains_sharded.__name__]
    assert why is None, why


def test_a_step_on_a_cpu_warns_that_numpy_is_slow():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train(Signum, {}, 2)
    messages = [str(one.message) for one in caught]
    assert messages == ["the rule 'signum' runs in NumPy on cpu: exact but slow"]


def test_a_backend_without_the_rule_says_so():
    with pytest.raises(RuntimeError, match="no kernel for the custom rule 'signum'"):
        train(Signum, {"backend": "cpu"})


def test_a_gpu_needs_triton_code():
    rule = replace(SIGNUM, triton_update=None)
    with pytest.raises(RuntimeError, match="'signum' has no Triton code"):
        onepass.backends.choose(torch.device("cuda"), rule=rule)


def test_the_class_has_the_options_of_the_rule():
    with pytest.raises(TypeError, match="no keyword 'bta'; did you mean 'beta'"):
        Signum(make_params(SHAPES, torch.float32, 1), bta=0.9)
    with pytest.raises(ValueError, match="beta must be a finite number"):
        Signum(make_params(SHAPES, torch.float32, 1), beta=float("nan"))
    with pytest.raises(ValueError, match="betas"):
        AdaBelief(make_params(SHAPES, torch.float32, 1), betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="decoupled_weight_decay must be True"):
        Signum(make_params(SHAPES, torch.float32, 1), decoupled_weight_decay=False)
    optimizer = Signum(make_params(SHAPES, torch.float32, 1), 0.5, 0.7)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["beta"] == 0.7


# --- commands ---

SIGNUM_NAME = "tests.support.custom_rules:Signum"


def test_onepass_memory_predicts_a_custom_rule(capsys):
    arguments = ["memory", "--model", "gpt2", "--optimizers", f"lion+mx8,{SIGNUM_NAME}+mx8"]
    assert main([*arguments, "--json"]) == 0
    lion, found = json.loads(capsys.readouterr().out)["optimizers"]
    assert found["name"] == f"{SIGNUM_NAME}+mx8"
    assert found["predicted"] == lion["predicted"]


def test_onepass_memory_reports_a_factory_that_raises(capsys):
    """The base class takes two arguments."""
    name = "onepass.optim:Optimizer"
    assert main(["memory", "--model", "gpt2", "--optimizers", f"lion,{name}"]) == 0
    assert f"not predicted: {name} raised TypeError" in capsys.readouterr().out


def test_onepass_bench_measures_a_custom_rule_against_float64(capsys):
    arguments = ["bench", "--rule", SIGNUM_NAME, "--numel", "5000", "--samples", "1"]
    assert main([*arguments, "--device", "cpu", "--providers", "onepass*"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^onepass-reference +[\d.]+", table, re.M)
    assert "it has no kernel for the custom rule 'signum'" in table


@pytest.mark.parametrize("name", ["onepass.optim:Optimizer", "torch.optim:AdamW", "tests:nothing"])
def test_onepass_bench_refuses_other_classes(name, capsys):
    assert main(["bench", "--rule", name]) == 2
    assert f"--rule {name}" in capsys.readouterr().err


# --- errors in a definition ---


def returns(*results):
    """An update function that calls results[0] with its arguments except the flags."""
    return lambda param, grad, states, h, flags: results[0](param, grad, states, h)


MISTAKES = {
    "number of states": (
        {"update": returns(lambda p, g, s, h: (p - g, ()))},
        "returns 0 states; the rule has 1",
    ),
    "no pair": ({"update": returns(lambda p, g, s, h: p)}, r"must return \(param, states\)"),
    "float64": (
        {"update": returns(lambda p, g, s, h: (p - np.float64(h[0]) * g, s))},
        "the weight is of float64",
    ),
    "shape": ({"update": returns(lambda p, g, s, h: (p[:1].sum(), s))}, "array of shape"),
    "NaN at zero": (
        {"update": returns(lambda p, g, s, h: (p - g / np.sqrt(g * g), s))},
        "becomes nan where weight and gradient are 0",
    ),
    "mixes elements": (
        {"update": returns(lambda p, g, s, h: (p - g / (1 + np.abs(g).max()), s))},
        "depends on other elements",
    ),
    "writes its arguments": (
        {"update": returns(lambda p, g, s, h: (np.subtract(p, g, out=p), s))},
        "changes its arguments",
    ),
    "name of a rule": ({"name": "adam"}, "has a rule of this name"),
    "name of a class": ({"name": "adam_w"}, "has a class AdamW"),
    "no identifier": ({"name": "my rule"}, "must be identifiers"),
    "kind of a state": ({"slots": (Slot("exp_avg", "third"),)}, "kind of 'exp_avg'"),
    "unknown flag": ({"slots": (Slot("exp_avg", "first", "on"),)}, "unknown flag 'on'"),
    "name of a state": ({"slots": (Slot("step", "first"),)}, "name of the state 'step' is taken"),
    "relative alone": ({"slots": (Slot("exp_avg", "relative"),)}, "needs one of kind 'second'"),
    "a keyword": ({"options": {"beta": 0.9, "states": 1.0}}, "option 'states' is taken"),
    "a key of groups": ({"options": {"beta": 0.9, "eps_in_sqrt": False}}, "'eps_in_sqrt' is taken"),
    "flag without option": ({"flags": (Flag("highest"),)}, "no option 'highest'"),
    "start without option": (
        {"slots": (Slot("exp_avg", "first", starts_at="start"),)},
        "no option 'start'",
    ),
    "derive raises": ({"derive": lambda o, step: (1 / 0,)}, "derive or advance raised Zero"),
    "derive returns no numbers": ({"derive": lambda o, step: 1.0}, "derive or advance raised"),
    "advance": (
        {"scalar_states": (ScalarState("total", 0.0),), "advance": lambda o, number, s: ()},
        "advance returns 0 scalar states; the rule has 1",
    ),
    "too many options": (
        {"options": {"beta": 0.9, **{f"x{i}": 1.0 for i in range(9)}}, "update": signum},
        "at most 9 are allowed",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_error_at_the_definition(change, message):
    with pytest.raises(ValueError, match=message):
        onepass.optimizer(replace_rule(**change))


@pytest.mark.parametrize("default", ["0.9", None, (), ("a", "b"), [0.9, 0.99]])
def test_a_default_of_another_type_is_refused(default):
    for value in (default, Option(default, check_real)):
        with pytest.raises(TypeError, match="default of 'beta'"):
            replace_rule(options={"beta": value})


def test_the_flag_of_a_number_is_checked_with_and_without_it():
    """A numeric option selects a variant by its truth value, as the momentum of SGD does."""
    seen = []

    def update(param, grad, states, h, flags):
        seen.append((tuple(flags), round(float(h[2]), 6)))
        return signum(param, grad, states, h, flags)

    onepass.optimizer(replace_rule(update=update, flags=(Flag("beta"),)))
    assert set(seen) == {((), 0.0), (("beta",), 0.9)}


def test_a_rule_with_derive_needs_it_in_triton_too():
    with pytest.raises(ValueError, match="no triton_derive"):
        replace_rule(derive=lambda o, step: (o[2], o[3], 0.9), triton_update=signum)


def test_a_rule_of_onepass_is_no_custom_rule():
    with pytest.raises(ValueError, match="onepass has a rule of this name"):
        onepass.optimizer(onepass.AdamW.rule)


def replace_rule(**change):
    """The rule of Signum with some arguments replaced."""
    parts = {
        "name": "signum",
        "options": {"beta": 0.9},
        "slots": (Slot("exp_avg", "first"),),
        "update": signum,
    }
    return onepass.Rule(**{**parts, **change})
