"""Global settings do not change a step: default dtype and device, grad modes, warnings."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch

import onepass

from .cases import assert_same, make_params, set_grads
from .support.thorough import THOROUGH
from .test_plan import BACKENDS


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def errors_from_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def flush_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS = {
    "dtype bf16": lambda: default_dtype(torch.bfloat16),
    "dtype fp64": lambda: default_dtype(torch.float64),
    "device meta": lambda: default_device("meta"),
    "with device": lambda: torch.device("meta"),
    "NumPy raises": lambda: np.errstate(all="raise"),
    "warnings": errors_from_warnings,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "denormals": flush_denormals,
}

KINDS = {
    "fp32": {},
    "clipped": {"max_grad_norm": 0.1, "skip_nonfinite": True, "telemetry": True},
    "averaged": {"ema_decay": 0.9, "zero_grads": True},
    "mx8": {"states": "mx8", "weights": "split8"},
    "mx4": {"states": "mx4", "weights": "master"},
    "dynamic8": {"states": "dynamic8", "weights": "kahan"},
    "paged": {"states": "bf16", "weights": "split16", "paged": True},
    "sgd": {"cls": onepass.SGD, "momentum": 0.9, "dampening": 0.5},
    "adagrad": {"cls": onepass.Adagrad, "states": "mx8", "initial_accumulator_value": 0.1},
}
TRITON_KINDS = ("fp32", "clipped", "mx8")


def build(backend, cls=onepass.AdamW, weights="native", **options):
    dtype = torch.float32 if weights == "native" else torch.bfloat16
    params = make_params([(7,), (3, 5), (300,)], dtype, 1)
    return params, cls(params, lr=1e-3, weights=weights, backend=backend, **options)


def train(params, optimizer, steps):
    for seed in steps:
        set_grads(params, params[0].dtype, seed)
        params[0].grad.mul_(1e-20)  # so that fp32 denormals occur
        optimizer.step()


def five_steps(backend, kind, settings):
    """The optimizer after a first step, later steps, and steps with a new plan."""
    params, optimizer = build(backend, **KINDS[kind])
    for seed in range(5):
        if seed == 3:
            optimizer.param_groups[0]["weight_decay"] = 0.2
            optimizer.state[params[1]] = copy.deepcopy(dict(optimizer.state[params[1]]))
        set_grads(params, params[0].dtype, seed)
        params[0].grad.mul_(1e-20)
        with settings():
            optimizer.step()
    return optimizer


@cache
def with_usual_settings(backend, kind):
    return five_steps(backend, kind, nullcontext)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_settings(backend, setting, kind):
    if backend == "reference" and setting == "denormals":
        pytest.skip("NumPy flushes them too; the compiled backends do not")
    row, column = list(SETTINGS).index(setting), list(KINDS).index(kind)
    if backend == "reference" and (row + column) % 3 and not THOROUGH:
        pytest.skip("make test-all runs every kind of step with every setting")
    if backend == "triton":
        if setting == "denormals":
            pytest.skip("Triton's interpreter computes by NumPy, with its settings")
        if kind not in TRITON_KINDS or not (THOROUGH or row % 3 == TRITON_KINDS.index(kind)):
            pytest.skip("Triton's interpreter is slow; make test-all runs three kinds of steps")
    changed = five_steps(backend, kind, SETTINGS[setting])
    assert_same(with_usual_settings(backend, kind), changed)


@pytest.mark.parametrize("setting", ["dtype bf16", "dtype fp64", "device meta", "with device"])
def test_checkpoints_do_not_depend_on_settings(setting):
    for options in KINDS.values():
        params, optimizer = build(None, **options)
        train(params, optimizer, (0, 1))
        saved = optimizer.state_dict()
        others, expected = build(None, **options)
        others_too, loaded = build(None, **options)
        with torch.no_grad():
            for p, q, r in zip(params, others, others_too, strict=True):
                q.copy_(p)
                r.copy_(p)
        expected.load_state_dict(saved)
        with SETTINGS[setting]():
            loaded.load_state_dict(copy.deepcopy(saved))
            converted = onepass.convert_state_dict(loaded, saved, states="fp32")
            assert loaded.skipped_steps.dtype == torch.int64
            if options.get("ema_decay"):
                with loaded.averaged_weights():
                    pass
        plain = onepass.convert_state_dict(expected, saved, states="fp32")
        for key, state in plain["state"].items():
            for name, value in state.items():
                assert torch.equal(converted["state"][key][name], value)
        train(others, expected, (2, 3))
        train(others_too, loaded, (2, 3))
        assert_same(expected, loaded)


@pytest.mark.parametrize("setting", ["dtype bf16", "dtype fp64", "device meta", "with device"])
def test_scalers_and_released_gradients_do_not_depend_on_settings(setting):
    made = []
    for within in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        optimizer = onepass.AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0)
        scaler = onepass.GradScaler("cpu", init_scale=8.0)
        x = torch.ones(2, 4)
        scaler.scale(model(x).sum()).backward()
        with SETTINGS[setting]() if within else torch.no_grad():
            scaler.step(optimizer)
        scaler.update()
        released = onepass.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = onepass.release_gradients(model, released)
        loss = model(x).sum()
        with SETTINGS[setting]() if within else torch.no_grad(), torch.enable_grad():
            loss.backward()
            released.step()
        handle.remove()
        made.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *made))
