"""Steps inside torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import onepass

from .cases import assert_same, same_bits
from .support.thorough import THOROUGH

OPTIONS = [
    {},
    {"max_grad_norm": 0.5, "zero_grads": True},
    {"states": "mx8", "skip_nonfinite": True},
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def twins(**options):
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))]
    nets.append(copy.deepcopy(nets[0]))
    return nets, [onepass.AdamW(net.parameters(), lr=0.02, **options) for net in nets]


def loss_of(net, step):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean()


COMPILERS = ["eager", "aot_eager", "inductor"]


# `make test` runs every compiler and all options once; test_gpu_graphs.py runs more on a GPU.
@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        (c, o)
        for c in COMPILERS
        for o in OPTIONS
        if THOROUGH or COMPILERS.index(c) == OPTIONS.index(o)
    ],
    ids=str,
)
def test_the_step_compiles_without_graph_breaks_to_the_same_bits(compiler, options):
    (ours, theirs), (compiled, plain) = twins(**options)
    step = torch.compile(compiled.step, backend=compiler, fullgraph=True)
    for i in range(4):
        for net, optimizer in ((ours, compiled), (theirs, plain)):
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            loss_of(net, i).backward()
        if i == 3:
            for optimizer in (compiled, plain):
                optimizer.param_groups[0]["lr"] = 0.001
        step()
        plain.step()
        if "zero_grads" in options:
            assert not any(p.grad.any() for p in ours.parameters())
    assert_same(compiled, plain)
    assert not counters["graph_break"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_step_has_no_graph_break_from_onepass(options):
    (ours, theirs), (compiled, plain) = twins(**options)

    def train(net, optimizer, x):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    # inductor is left out because its own forward and backward passes round differently.
    compiled_train = torch.compile(train, backend="aot_eager")
    for i in range(4):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        compiled_train(ours, compiled, x)
        train(theirs, plain, x)
    assert_same(compiled, plain)
    assert not [reason for reason in counters["graph_break"] if "onepass" in reason]


def test_gradients_that_the_graph_itself_computes():
    (ours, theirs), (compiled, plain) = twins()
    for net, optimizer in ((ours, compiled), (theirs, plain)):
        loss_of(net, 0).backward()
        optimizer.step()

    def train(net, optimizer, scale):
        for p in net.parameters():
            p.grad.mul_(scale)
        optimizer.step()
        return sum(p.sum() for p in net.parameters())

    graph = torch.compile(train, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = graph(ours, compiled, torch.tensor(0.5))
        expected = train(theirs, plain, torch.tensor(0.5))
    assert same_bits(found.detach(), expected.detach())
    assert_same(compiled, plain)


def test_a_graph_outlives_loading_and_not_the_optimizer():
    (ours, theirs), (compiled, plain) = twins()
    step = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for i in range(2):
        for net in (ours, theirs):
            net.zero_grad()
            loss_of(net, i).backward()
        step()
        plain.step()
    compiled.load_state_dict(plain.state_dict())
    for net in (ours, theirs):
        net.zero_grad()
        loss_of(net, 5).backward()
    step()
    plain.step()
    assert_same(compiled, plain)


def test_a_graph_keeps_the_step_out_of_cuda_graphs(monkeypatch):
    """mode="reduce-overhead" must not replay the step.

    Parameters have fixed addresses, so inductor would otherwise put the step into a CUDA graph,
    which repeats the hyperparameters of an earlier step.
    """
    from torch._inductor import compile_fx, config

    found = []
    ask = compile_fx.get_first_incompatible_cudagraph_node
    monkeypatch.setattr(
        compile_fx,
        "get_first_incompatible_cudagraph_node",
        lambda graph: found.append(ask(graph)) or found[-1],
    )
    # Set by a context manager, because monkeypatch would delete an option that is an alias of one
    # in torch.compiler when it is undone.
    with config.patch(graph_partition=False, force_disable_caches=True):
        for zeroes in (False, True):
            (net, _), (optimizer, _) = twins(zero_grads=zeroes)
            loss_of(net, 0).backward()
            torch.compile(optimizer.step, mode="reduce-overhead", fullgraph=True)()
    assert [node.target.name() for node in found] == [
        "onepass::optimizer_step",
        "onepass::optimizer_step_zeroing",
    ]
