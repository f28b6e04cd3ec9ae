"""Steps of the cuda backend captured in a graph, on the stand-in: csrc/cuda compiled by g++.

The shim of the CUDA runtime records the launches of a capture and replays them.
"""

from __future__ import annotations

import pytest
import torch

import onepass

from . import cuda_shim
from .cases import assert_same, clone, make_params, set_grads
from .support.targets import STAND_IN, needs_stand_in

pytestmark = [needs_stand_in, pytest.mark.usefixtures("cuda_stand_in")]


@pytest.fixture
def capture(monkeypatch):
    """A capture of the shim that torch also reports as active."""
    state = cuda_shim.Capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.active)
    return state


def gradients(params, seed, dtype=torch.float32):
    set_grads(params, dtype, seed)
    return [p.grad for p in params]


def test_a_captured_step_is_replayed_among_eager_ones_with_its_own_gradients(capture):
    """Eager steps between replays have other gradients, also of another dtype, and other options.

    Eager steps and replays must not read each other's tables.
    """
    params = make_params([(33,), (2085,), (4, 5)], torch.bfloat16, 1)
    expected = clone(params)
    options = {"lr": 0.1, "states": "mx8", "weights": "split8", "zero_grads": True}
    ours = onepass.AdamW(params, **options, backend=STAND_IN)
    reference = onepass.AdamW(expected, **options, backend="reference")

    def eager(seed, dtype=torch.float32):
        gradients(params, seed, dtype)
        ours.step()
        gradients(expected, seed, dtype)
        reference.step()

    eager(0)
    static = gradients(params, 1)
    before = cuda_shim.launches()
    with capture:
        ours.step()
    assert cuda_shim.launches() == before
    plan = ours._plan

    def replay(seed):
        values = gradients(expected, seed)
        for grad, value in zip(static, values, strict=True):
            grad.copy_(value)
        reference.step()
        capture.replay()
        assert not any(grad.any() for grad in static)
        assert_same(ours, reference)

    replay(1)
    replay(2)
    eager(3)
    replay(4)
    eager(5, torch.bfloat16)
    assert_same(ours, reference)
    replay(6)
    # A new plan is built, and the graph still has the tables of the old plan.
    ours.load_state_dict(ours.state_dict())
    assert ours._plan is None
    assert plan in ours.captured
    capture.replay()


def test_a_capture_needs_a_step_before_it(capture):
    params = make_params([(5,)], torch.float32, 0)
    gradients(params, 0)
    optimizer = onepass.SGD(params, backend=STAND_IN)
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    with capture, pytest.raises(RuntimeError, match="needs a step before it with the same option"):
        optimizer.step()
    optimizer.max_grad_norm = None
    gradients(params, 0, torch.bfloat16)
    with capture, pytest.raises(RuntimeError, match="before it with gradients of these dtypes"):
        optimizer.step()
