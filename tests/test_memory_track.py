"""onepass.memory.track: a timeline of memory by category."""

from __future__ import annotations

import json

import pytest
import torch

import onepass
from onepass import memory


def model_and_optimizer(make=lambda p: onepass.AdamW(p, states="bf16")):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    return model, make(model.parameters())


def train(model, optimizer, steps=2, after=lambda: None):
    for _ in range(steps):
        loss = model(torch.ones(32, 64)).square().mean()
        after()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("make", "each"),
    [
        (lambda p: onepass.AdamW(p), 8),
        (lambda p: onepass.Lion(p, states="bf16"), 2),
        (lambda p: torch.optim.AdamW(p, foreach=True), 8),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    ],
)
def test_categories(make, each):
    model, optimizer = model_and_optimizer(make)
    count = sum(p.numel() for p in model.parameters())
    with memory.track(model, optimizer) as timeline:
        train(model, optimizer)
    most = {category: max(values) for category, values in timeline.bytes.items()}
    assert most["weights"] == 4 * count
    assert most["gradients"] == 4 * count
    assert most["states"] == pytest.approx(each * count, rel=0.01)
    # Autograd saves the input of the model, and the input and output of the activation.
    assert 32 * (64 + 2 * 256) * 4 <= most["activations"] <= 1.5 * 32 * (64 + 2 * 256) * 4
    # At the end, gradients and activations are freed.
    left = {category: values[-1] for category, values in timeline.bytes.items()}
    assert left["gradients"] == left["activations"] == 0
    assert left["states"] == most["states"]
    assert timeline.seconds == sorted(timeline.seconds)
    assert all(value >= 0 for values in timeline.bytes.values() for value in values)
    assert timeline.peak == max(timeline.total) == sum(timeline.at_peak().values())
    assert [word for _, word in timeline.marks] == ["step", "step"]


def test_foreach_is_temporary_in_the_step_and_ours_is_not():
    extra = {}
    for name, make in (
        ("torch", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("onepass", lambda p: onepass.AdamW(p)),
    ):
        model, optimizer = model_and_optimizer(make)
        train(model, optimizer)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with memory.track(model, optimizer) as timeline:
            optimizer.step()
        extra[name] = max(timeline.bytes["temporary"])
    count = sum(p.numel() for p in model.parameters())
    assert extra["torch"] == pytest.approx(4 * count, rel=0.01)
    assert extra["onepass"] < 0.01 * count


def test_tracking_changes_no_result_and_leaves_no_hook():
    losses = []
    for tracked in (False, True):
        model, optimizer = model_and_optimizer()
        if tracked:
            with memory.track(model, optimizer):
                train(model, optimizer)
        else:
            train(model, optimizer)
        losses.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *losses))
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert not any(hooks)
    assert not optimizer._optimizer_step_post_hooks


def test_an_exception_ends_tracking_and_keeps_the_timeline():
    model, optimizer = model_and_optimizer()
    with pytest.raises(RuntimeError, match="stop"), memory.track(model, optimizer) as timeline:
        raise RuntimeError("stop")
    assert timeline.peak == 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"mark\(\) must be called within track\(\)"):
        timeline.mark("late")


def test_a_timeline_can_be_saved_and_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    model, optimizer = model_and_optimizer()
    with memory.track(model, optimizer) as timeline:
        train(model, optimizer, after=lambda: timeline.mark("forward"))
    timeline.save(tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text())
    assert saved["bytes"]["weights"][0] > 0
    assert [word for _, word in saved["marks"]] == ["forward", "step"] * 2
    timeline.plot(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
