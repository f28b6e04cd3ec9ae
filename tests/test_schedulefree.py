"""AdamWScheduleFree: its formula, its modes, the package schedulefree, and checkpoints.

The backend suite runs its rule in every format (tests/test_bits.py).
"""

from __future__ import annotations

import copy
import inspect
import json
import math

import numpy as np
import pytest
import torch

import onepass
from onepass.rules.base import exponential, logarithm
from onepass.rules.schedulefree import RULE, advance

from .cases import assert_same, make_params, same_bits, set_grads, train
from .schedulefree_record import PATH, STEPS, parameters
from .schedulefree_record import set_grads as recorded_grads

RECORDED = json.loads(PATH.read_text())
RUNS = [pytest.param(run, id=f"run{i}") for i, run in enumerate(RECORDED["runs"])]
SHAPES = [(33,), (4, 5), (300,)]
FORMATS = [
    ({}, torch.float32),
    ({"states": "mx8"}, torch.float32),
    ({"states": "bf16", "weights": "stochastic"}, torch.bfloat16),
    ({"states": "mx4", "weights": "split16"}, torch.bfloat16),
    ({"states": "dynamic8", "weights": "split8", "paged": True}, torch.bfloat16),
    ({"weights": "kahan"}, torch.float16),
    ({"weights": "master"}, torch.bfloat16),
]
IDS = ["-".join([*map(str, f.values()), str(d)[6:]]) for f, d in FORMATS]
formats = pytest.mark.parametrize(("options", "dtype"), FORMATS, ids=IDS)


def made(options, dtype=torch.float32):
    params = make_params(SHAPES, dtype, 1)
    return params, onepass.AdamWScheduleFree(params, lr=0.02, weight_decay=0.1, seed=3, **options)


def close(params, expected, ulps):
    """Whether weights equal recorded values within fp32 rounding errors of the largest weight."""
    eps = torch.finfo(torch.float32).eps
    for param, value in zip(params, expected, strict=True):
        value = torch.tensor(value)
        assert (param - value).abs().max() <= ulps * eps * value.abs().max()


# --- the package ---


def test_the_arguments_are_those_of_schedulefree():
    ours = list(inspect.signature(onepass.AdamWScheduleFree).parameters.values())[1:]
    for parameter, (name, default) in zip(ours, RECORDED["arguments"], strict=False):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert parameter.name == name
        if name != "foreach":
            found = parameter.default
            assert (list(found) if isinstance(found, tuple) else found) == default, name


def run_to(run, steps):
    params = parameters()
    optimizer = onepass.AdamWScheduleFree(params, **run["options"])
    for step in range(steps):
        recorded_grads(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("run", RUNS)
def test_a_run_equals_that_of_schedulefree(run):
    """Each step and each eval() rounds a few operations differently: one ulp each, 4 at most."""
    params, optimizer = run_to(run, STEPS)
    close(params, run["train"]["weights"], 4)
    optimizer.eval()
    close(params, run["eval"]["weights"], 4)
    for i, param in enumerate(params):
        theirs = run["train"]["state_dict"]["state"][str(i)]
        close([optimizer.state[param]["z"]], [theirs["z"]], 4)
        close([optimizer.state[param]["exp_avg_sq"]], [theirs["exp_avg_sq"]], 4)
    optimizer.train()
    recorded_grads(params, STEPS)
    optimizer.step()
    close(params, run["after"], 5)
    optimizer.eval()
    close(params, run["after_eval"], 5)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("run", RUNS)
def test_a_state_dict_of_schedulefree_is_loaded(run, mode):
    params = [torch.nn.Parameter(torch.tensor(value)) for value in run[mode]["weights"]]
    saved = copy.deepcopy(run[mode]["state_dict"])
    saved["state"] = {
        int(i): {key: torch.tensor(value) for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    before = copy.deepcopy(saved)
    optimizer = onepass.AdamWScheduleFree(params, **run["options"])
    optimizer.load_state_dict(saved)
    assert repr(saved) == repr(before)
    ours = run_to(run, STEPS)[1]
    kept, expected = (o.state[o.param_groups[0]["params"][0]] for o in (optimizer, ours))
    for key in ("step", "weight_sum", "lr_max"):
        assert float(kept[key]) == pytest.approx(float(expected[key]), rel=1e-6)
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\)"):
            optimizer.step()
        optimizer.train()
    recorded_grads(params, STEPS)
    optimizer.step()
    close(params, run["after"], 4)
    optimizer.eval()
    close(params, run["after_eval"], 4)


# --- modes ---


@formats
def test_train_restores_the_bits_that_eval_replaced(options, dtype):
    params, optimizer = made(options, dtype)
    others, plain = made(options, dtype)
    for o in (optimizer, plain):
        train(o, o.param_groups[0]["params"], 3)
    optimizer.eval()
    assert not any(same_bits(p, q) for p, q in zip(params, others, strict=True))
    optimizer.eval()  # does nothing
    optimizer.train()
    assert_same(optimizer, plain)
    optimizer.eval()
    optimizer.train()
    optimizer.train()
    for o in (optimizer, plain):
        train(o, o.param_groups[0]["params"], 2, start=3)
    assert_same(optimizer, plain)


@formats
def test_eval_gives_the_average_of_z(options, dtype):
    """x follows its own recurrence in float64, from the z that the optimizer computed."""
    params, optimizer = made(options, dtype)
    x = [p.detach().double() for p in params]
    for step in range(12):
        train(optimizer, params, 1, start=step)
        share = 1 / (step + 1)  # of a constant learning rate
        z = [optimizer.state[p]["z"].double() for p in params]
        x = [(1 - share) * a + share * b for a, b in zip(x, z, strict=True)]
    optimizer.eval()
    # 12 roundings of y, which eval() divides by 0.9, and one of x: stochastic rounding takes up to
    # one unit in the last place each time, a 16-bit format with a companion rounds x only.
    eps = torch.finfo(dtype).eps
    if options.get("weights") in ("split16", "split8", "kahan", "master"):
        limit = 1.5 * eps
    else:
        limit = 12 * eps
    if options.get("states") == "bf16":
        limit = 60 * eps  # z is rounded after it was used
    for p, expected in zip(params, x, strict=True):
        assert (p.double() - expected).abs().max() <= limit * expected.abs().max()


def test_a_step_in_eval_mode_raises_and_changes_nothing():
    params, optimizer = made({"max_grad_norm": 1.0})
    train(optimizer, params, 2)
    optimizer.eval()
    before = [p.detach().clone() for p in params]
    counts = [float(optimizer.state[p]["step"]) for p in params]
    scaler = onepass.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for step in (optimizer.step, lambda: scaler.step(optimizer)):
        with pytest.raises(RuntimeError, match=r"eval mode.*call optimizer\.train\(\) before"):
            step()
    assert all(map(same_bits, params, before))
    assert counts == [float(optimizer.state[p]["step"]) for p in params]
    optimizer.train()
    train(optimizer, params, 1, start=2)


def test_released_gradients_are_refused_in_eval_mode():
    params, optimizer = made({})
    onepass.release_gradients(torch.nn.ParameterList(params), optimizer)
    for mode in (optimizer.train, optimizer.eval):
        mode()
        before = [p.detach().clone() for p in params]
        loss = sum(p.square().sum() for p in params)
        if optimizer.training:
            loss.backward()
            assert not any(map(same_bits, params, before))
            continue
        with pytest.raises(RuntimeError, match="eval mode"):
            loss.backward()
        assert all(map(same_bits, params, before))


def test_an_error_in_eval_leaves_the_training_weights(monkeypatch):
    params, optimizer = made({"weights": "split16"}, torch.bfloat16)
    train(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    real, calls = onepass.AdamWScheduleFree._mix, []

    def failing(self, param, share):
        calls.append(param)
        if len(calls) == 3:
            raise MemoryError
        real(self, param, share)

    monkeypatch.setattr(onepass.AdamWScheduleFree, "_mix", failing)
    with pytest.raises(MemoryError):
        optimizer.eval()
    assert all(map(same_bits, params, weights))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for entry, kept in zip(after["state"].values(), before["state"].values(), strict=True):
        assert entry.keys() == kept.keys()
        assert all(torch.equal(entry[key], kept[key]) for key in kept)
    train(optimizer, params, 1, start=2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@formats
def test_a_run_resumes_bit_for_bit_in_both_modes(options, dtype, mode, tmp_path):
    params, optimizer = made(options, dtype)
    train(optimizer, params, 4)
    others, half = made(options, dtype)
    train(half, others, 2)
    getattr(half, mode)()
    torch.save([others, half.state_dict()], tmp_path / "run.pt")
    weights, saved = torch.load(tmp_path / "run.pt", weights_only=False)
    resumed = onepass.AdamWScheduleFree(weights, **options)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["train_mode"] is (mode == "train")
    resumed.train()
    train(resumed, weights, 2, start=2)
    assert_same(resumed, optimizer)


def test_the_trainer_evaluates_the_averages_and_continues_with_the_same_bits():
    data = [(torch.linspace(-1, 1, 8)[:, None], torch.linspace(2, 3, 8)[:, None])]
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        trainers.append(onepass.training.Trainer(model, "adamwschedulefree", 0.1, warmup_steps=0))
    for _ in range(3):
        losses = [one.train_step(*data[0]) for one in trainers]
        found = trainers[0].evaluate(data)
    assert losses[0] == losses[1]
    trainers[1].optimizer.eval()
    assert trainers[1].evaluate(data) == found
    assert not trainers[1].optimizer.training
    trainers[1].optimizer.train()
    weights = [one.model.weight for one in trainers]
    assert same_bits(*weights)


def test_full_precision_weights_in_eval_mode_are_the_averages():
    model = torch.nn.Linear(40, 3).to(torch.bfloat16)
    optimizer = onepass.AdamWScheduleFree(model.parameters(), lr=0.1, weights="split16")
    for step in range(2):
        set_grads(list(model.parameters()), torch.bfloat16, step)
        optimizer.step()
    optimizer.eval()
    exported = onepass.full_precision_state_dict(model, optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(exported[name], param.float())


# --- the average ---


def averaged(rates, r=0.0, power=2.0, warmup_steps=0):
    """c_t of onepass after some steps, with fp32 scalar states, and of the formula in float64."""
    total = highest = 0.0
    states = (0.0, 0.0)
    for t, lr in enumerate(rates, 1):
        row = RULE.options_row(
            {
                "lr": lr,
                "weight_decay": 0,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": power,
            }
        )
        states = tuple(float(np.float32(x)) for x in advance(row, t, states))
        highest = max(highest, lr * min(1.0, t / (warmup_steps or 1)))
        weight = t**r * highest**power
        total += weight
    return 1 / states[0] if states[0] else 0.0, weight / total if total else 0.0


@pytest.mark.parametrize(
    ("options", "bound"),
    [({}, 0.0), ({"warmup_steps": 500}, 1e-6), ({"r": 1.0}, 1e-4), ({"power": 0.0}, 0.0)],
)
def test_shares_of_long_runs_are_right(options, bound):
    """fp32 counts exactly to 2^24; with r > 0, weight_sum is rounded in each step."""
    found, exact = averaged([0.01] * 4000, **options)
    assert found == pytest.approx(exact, rel=max(bound, 1e-12))


def test_shares_follow_a_changed_learning_rate():
    rates = [0.0, 0.0, 0.01, 0.003, 0.02, 0.02, 1e-30, 0.5]
    for end in range(1, len(rates) + 1):
        found, exact = averaged(rates[:end], r=0.5, power=1.3)
        assert found == pytest.approx(exact, rel=1e-6)


def test_odd_scalar_states_do_not_hang_or_become_nan():
    """As from a damaged checkpoint, or a learning rate on a GPU, which the host does not check."""
    group = {"weight_decay": 0, "betas": (0.9, 0.999), "eps": 1e-8, "warmup_steps": 0, "r": 1.0}
    for lr in (0.0, 1e-45, 0.01, math.inf):
        row = RULE.options_row({**group, "lr": lr, "weight_lr_power": 2.0})
        for states in ((5.0, 0.0), (-1.0, -1.0), (1e30, 1e-45), (0.0, 3e38), (1e-45, 1.0)):
            found = advance(row, 7, states)
            assert found[0] >= 0.0
            assert not math.isnan(found[0])


def test_logarithms_and_powers_are_accurate():
    for x in [1.0, 0.5, 0.999999, 1 - 2**-53, 1e-300, 5e-324, *np.random.default_rng(0).random(99)]:
        assert logarithm(x) == pytest.approx(math.log(x), rel=1e-14, abs=1e-16)
        assert exponential(2.5 * logarithm(x)) == pytest.approx(x**2.5, rel=1e-11, abs=1e-300)
    assert logarithm(1.0) == 0.0
    assert math.isfinite(logarithm(0.0))


def test_a_parameter_counts_its_own_steps():
    params, optimizer = made({})
    train(optimizer, params, 2)
    params[0].grad = None
    optimizer.step()
    counts = [float(optimizer.state[p]["weight_sum"]) for p in params]
    assert counts == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.0, 0.999)}, r"betas\[0\] must be in \(0, 1\)"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"r": -1.0}, "r must be a finite number >= 0"),
        ({"weight_lr_power": 101.0}, "weight_lr_power must be at most 100"),
        ({"lr": float("nan")}, "lr must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        onepass.AdamWScheduleFree(make_params(SHAPES, torch.float32, 1), **options)


def test_z_in_a_format_with_blocks_is_refused():
    params, optimizer = made({"states": "mx8"})
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["z"], entry["z_scale"] = entry["exp_avg_sq"], entry["exp_avg_sq_scale"]
    with pytest.raises(ValueError, match=r"z of parameter 0 .* a weight is stored in fp32 or bf16"):
        optimizer.load_state_dict(saved)


def test_states_are_converted_between_formats():
    params, optimizer = made({"states": "mx8"})
    train(optimizer, params, 2)
    for states in ("mx4", "bf16", "fp32", "dynamic8"):
        other = onepass.AdamWScheduleFree(params, states=states)
        other.load_state_dict(optimizer.state_dict())
        back = onepass.convert_state_dict(other, other.state_dict(), states="fp32")
        for i, param in enumerate(params):
            z = optimizer.state[param]["z"]
            expected = z.bfloat16().float() if states == "bf16" else z
            assert same_bits(back["state"][i]["z"], expected)
        other.step()
