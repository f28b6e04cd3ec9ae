"""Steps inside torch.compile and inside CUDA graphs, on each device."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters

from .support.devices import Pair, each_target, replayable, stream_of
from .support.thorough import THOROUGH
from .test_gpu_features import FORMAT_IDS, FORMATS, loss_of, network

OPTIONS = [{}, {"states": "mx8", "skip_nonfinite": True, "zero_grads": True}]
OPTION_IDS = ["fp32", "mx8-skip-zero"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


# --- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def _few_on_cpu(device, request):
    """Skips all but one compiler and one set of options on the CPU; test_compile.py has them."""
    chosen = request.node.callspec.params
    few = chosen["compiler"] == "aot_eager" and chosen.get("options", {}) == {}
    if device == "cpu" and not few and not THOROUGH:
        pytest.skip("test_compile.py compiles on the CPU; make test-all runs these too")


COMPILERS = {
    "eager": {"backend": "eager"},
    "aot_eager": {"backend": "aot_eager"},
    "inductor": {"backend": "inductor"},
    "reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
}


@each_target
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("_few_on_cpu")
def test_a_compiled_step(device, backend, compiler, options):
    """The step has no graph break, reads changed options, and zeroes gradients on request."""
    net = network(device)
    pair = Pair(device, backend, params=net.parameters(), **options)
    step = torch.compile(pair.ours.step, fullgraph=True, **COMPILERS[compiler])
    for i in range(5):
        pair.ours.zero_grad(set_to_none=i % 2 == 0)
        loss_of(net, i).backward()
        if i == 3:
            for optimizer in (pair.ours, pair.reference):
                optimizer.param_groups[0]["lr"] = 0.001
        grads = [p.grad.clone() for p in pair.params]
        step()
        pair.step_reference(grads)
        if "zero_grads" in options:
            assert not any(bool(p.grad.any()) for p in pair.params)
    pair.assert_same()
    assert not counters["graph_break"]


@each_target
@pytest.mark.parametrize("options", [{}, {"states": "mx8"}], ids=["fp32", "mx8"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("_few_on_cpu")
def test_a_compiled_training_step(device, backend, compiler, options):
    """Compiles the forward and backward pass as well; the reference takes the same gradients."""
    if (device, compiler) == ("cpu", "inductor"):
        pytest.skip("compiling C++ takes half a minute")
    net = network(device)
    pair = Pair(device, backend, params=net.parameters(), **options)

    def train(x):
        pair.ours.zero_grad()
        net(x).square().mean().backward()
        pair.ours.step()

    compiled = torch.compile(train, backend=compiler)
    for i in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        compiled(x.to(device))
        pair.step_reference()
    pair.assert_same()
    assert not [reason for reason in counters["graph_break"] if "onepass" in reason]


@each_target
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("_few_on_cpu")
def test_gradients_that_the_graph_itself_computes(device, backend, compiler):
    """After the step, the graph reads the weights that the step wrote."""
    net = network(device)
    pair = Pair(device, backend, params=net.parameters())
    loss_of(net, 0).backward()
    pair.ours.step()
    pair.step_reference()

    def train(scale):
        for p in net.parameters():
            p.grad.mul_(scale)
        pair.ours.step()
        return [p * 2 for p in net.parameters()]

    graph = torch.compile(train, backend=compiler, fullgraph=True)
    for _ in range(2):
        found = graph(torch.tensor(0.5, device=device))
        pair.step_reference()
        for value, p in zip(found, pair.params, strict=True):
            assert torch.equal(value, p * 2)
    pair.assert_same()


# --- CUDA graphs -----------------------------------------------------------------------------


def warmed_up(device, run):
    """Runs twice on a side stream, as torch requires before a backward pass is captured."""
    side, on_side = stream_of(device)
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with on_side():
        for _ in range(2):
            run()
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)


@each_target
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made"])
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
def test_a_captured_training_step(device, backend, dtype, options, kept):
    """Captures forward pass, backward pass and step; each replay is compared with the reference.

    The learning rate changes, and one step is skipped. Gradients are either kept from the steps
    before the capture and zeroed in the graph, or made in the graph.
    """
    net = network(device, dtype)
    x = torch.zeros(5, 8, device=device, dtype=dtype)
    lr, twin_lr = torch.tensor(0.02, device=device), torch.tensor(0.02)
    pair = Pair(
        device, backend, params=net.parameters(), ours={"lr": lr}, lr=twin_lr,
        skip_nonfinite=True, **options,
    )  # fmt: skip

    def train():
        if kept:
            pair.ours.zero_grad(set_to_none=False)
        net(x).float().square().mean().backward()
        pair.ours.step()

    def set_input(step):
        x.copy_(torch.randn(5, 8, generator=torch.Generator().manual_seed(step)))

    def eager():
        pair.ours.zero_grad(set_to_none=not kept)
        train()
        pair.step_reference()

    set_input(0)
    warmed_up(device, eager)
    pair.assert_same()
    pair.ours.zero_grad(set_to_none=not kept)
    replay = replayable(device, train)
    for step in range(1, 6):
        set_input(step)
        lr.fill_(0.1 / step)
        twin_lr.fill_(0.1 / step)
        if step == 3:
            x[2, 5] = math.nan
        if device == "cpu":
            pair.ours.zero_grad(set_to_none=not kept)
        replay()
        pair.step_reference()
        pair.assert_same()
    assert int(pair.ours.skipped_steps) == int(pair.reference.skipped_steps) == 1
    assert {float(state["step"]) for state in pair.ours.state.values()} == {6.0}
    if device == "cuda":
        # An eager step after replays, and a replay after the eager step.
        gradients = [p.grad for p in pair.params]
        pair.ours.zero_grad()
        eager()
        for p, grad in zip(pair.params, gradients, strict=True):
            p.grad = grad
        set_input(7)
        replay()
        pair.step_reference()
        pair.assert_same()


@each_target
@pytest.mark.parametrize("zeroes", [False, True], ids=["", "zero"])
def test_a_captured_step_with_a_loss_scale_and_a_flag(device, backend, zeroes):
    """Every replay reads the scale and the flag. A skipped step zeroes gradients as well."""
    pair = Pair(device, backend, zero_grads=zeroes, states="mx8")
    both = (pair.ours, device), (pair.reference, "cpu")
    for optimizer, where in both:
        optimizer.grad_scale = torch.ones((), device=where)
        optimizer.found_inf = torch.zeros((), device=where)
    for step in range(2):
        pair.step(step)
    static = [p.grad for p in pair.params]
    replay = replayable(device, pair.ours.step)
    for step in range(2, 6):
        pair.set_grads(step)
        for p, grad in zip(pair.params, static, strict=True):
            p.grad = grad.copy_(p.grad)
        for optimizer, _ in both:
            optimizer.grad_scale.fill_(2.0**step)
            optimizer.found_inf.fill_(float(step == 3))
        replay()
        pair.reference.step()
        pair.assert_same()
        assert any(bool(grad.any()) for grad in static) != zeroes
    assert int(pair.ours.skipped_steps) == int(pair.reference.skipped_steps) == 1
