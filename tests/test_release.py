"""Gradient release: parameters are updated, and gradients freed, in the backward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import onepass

from .cases import CASES, assert_same, last_variant, same_bits


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)
    )


def twins():
    ours = model()
    return ours, copy.deepcopy(ours)


def backward(net, step, size=1.0):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    (size * net(x).square().mean()).backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_gradient_release_has_the_bits_of_ordinary_steps(case, states):
    options = {**last_variant(case, states), "states": states}
    ours, theirs = twins()
    released, plain = (
        case.ours(ours.parameters(), **options),
        case.ours(theirs.parameters(), **options),
    )
    handle = onepass.release_gradients(ours, released)
    for step in range(4):
        backward(ours, step)
        assert all(p.grad is None for p in ours.parameters())
        released.step()
        backward(theirs, step)
        plain.step()
        plain.zero_grad()
    assert_same(released, plain)
    handle.remove()
    for net, optimizer in ((ours, released), (theirs, plain)):
        backward(net, 9)
        optimizer.step()
    assert ours[0].weight.grad is not None
    assert_same(released, plain)


def test_gradients_are_freed_as_they_arrive():
    net = model()
    optimizer = onepass.AdamW(net.parameters())
    onepass.release_gradients(net, optimizer)
    # Hooks run in the order of registration, so this hook runs after that of release_gradients.
    alive = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in net.parameters()))
        )
    backward(net, 0)
    assert alive == [0] * len(list(net.parameters()))


def test_micro_batches_accumulate_while_paused():
    ours, theirs = twins()
    released, plain = (onepass.AdamW(net.parameters(), lr=0.02) for net in (ours, theirs))
    handle = onepass.release_gradients(ours, released)
    for step in range(3):
        with handle.paused():
            backward(ours, 3 * step)
            backward(ours, 3 * step + 1)
            assert ours[0].weight.grad is not None
        backward(ours, 3 * step + 2)
        for micro in range(3):
            backward(theirs, 3 * step + micro)
        plain.step()
        plain.zero_grad()
    assert_same(released, plain)


@pytest.mark.parametrize("calls_step", [True, False])
def test_clipping_by_the_norm_of_the_step_before(calls_step):
    ours, theirs = twins()
    released = onepass.AdamW(ours.parameters(), lr=0.02, max_grad_norm=0.1)
    plain = onepass.AdamW(theirs.parameters(), lr=0.02)
    onepass.release_gradients(ours, released, clip_by_previous_norm=True)
    norm = 0.0
    for step in range(4):
        backward(ours, step, size=10.0)
        if calls_step:
            released.step()
            torch.testing.assert_close(
                released.grad_norm.double(), _norm_of(theirs, step), rtol=1e-6, atol=0
            )
        norm_before, norm = norm, float(_norm_of(theirs, step))
        coefficient = min(1.0, 0.1 / (norm_before + 1e-6))
        for p in theirs.parameters():
            p.grad = p.grad * coefficient
        plain.step()
        plain.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=2e-6)


def _norm_of(net, step):
    net.zero_grad()
    backward(net, step, size=10.0)
    return torch.cat([p.grad.double().flatten() for p in net.parameters()]).norm()


def test_other_parameters_of_the_optimizer_wait_for_step():
    net, other = model(), torch.nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([{"params": net.parameters()}, {"params": [other]}], lr=0.02)
    onepass.release_gradients(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    other.grad = torch.ones(3)
    backward(net, 0)
    after = [p.detach().clone() for p in net.parameters()]
    assert not any(map(same_bits, before, after))
    optimizer.step()
    assert all(map(same_bits, after, (p.detach() for p in net.parameters())))
    assert float(optimizer.state[other]["step"]) == 1
    assert not torch.equal(other.detach(), torch.ones(3))


def test_state_dicts_load_with_and_without_gradient_release():
    ours, theirs = twins()
    released, plain = (onepass.AdamW(net.parameters(), lr=0.02) for net in (ours, theirs))
    onepass.release_gradients(ours, released)
    for step in range(2):
        backward(ours, step)
        backward(theirs, step)
        plain.step()
        plain.zero_grad()
    resumed = copy.deepcopy(theirs)
    fresh = onepass.AdamW(resumed.parameters(), lr=0.02)
    fresh.load_state_dict(released.state_dict())
    onepass.release_gradients(resumed, fresh)
    released.load_state_dict(plain.state_dict())  # in the middle of a run with gradient release
    for step in range(2, 4):
        backward(ours, step)
        backward(resumed, step)
        backward(theirs, step)
        plain.step()
        plain.zero_grad()
    assert_same(released, plain)
    assert_same(fresh, plain)


def test_what_cannot_be_released_is_refused():
    net = model()

    def adamw(**options):
        return onepass.AdamW(net.parameters(), **options)

    for options, keywords, message in [
        ({"max_grad_norm": 1.0}, {}, "clip_by_previous_norm=True"),
        ({}, {"clip_by_previous_norm": True}, "max_grad_norm"),
        ({"skip_nonfinite": True}, {}, "skip_nonfinite needs"),
        ({"telemetry": True}, {}, "telemetry needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            onepass.release_gradients(net, adamw(**options), **keywords)
    with pytest.raises(ValueError, match="must have a parameter of the optimizer"):
        onepass.release_gradients(model(), adamw())
    optimizer = adamw()
    handle = onepass.release_gradients(net, optimizer)
    with pytest.raises(ValueError, match="already"):
        onepass.release_gradients(net, optimizer)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be"):
        backward(net, 0)
    optimizer.param_groups[0]["lr"] = 1e-3
    scaler = onepass.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    net.zero_grad()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    handle.remove()
    onepass.release_gradients(net, optimizer).remove()
