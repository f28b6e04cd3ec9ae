"""FSDP2 on one rank: NCCL on a GPU, gloo on the CPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import onepass

from .cases import same_bits
from .support.devices import each_target

pytestmark = [
    each_target,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
    ),
]
BF16 = torch.bfloat16
FORMATS = {
    "fp32": (torch.float32, {}),
    "mx8": (torch.float32, {"states": "mx8"}),
    "mx8-split8": (BF16, {"states": "mx8", "weights": "split8"}),
    "clipped": (torch.float32, {"states": "mx8", "max_grad_norm": 0.01}),
    "largest": (BF16, {"states": "bf16", "max_grad_norm": 1e-3, "norm_type": math.inf}),
    "averaged": (BF16, {"states": "mx8", "ema_decay": 0.9, "telemetry": True}),
}
each_format = pytest.mark.parametrize(("dtype", "options"), FORMATS.values(), ids=FORMATS)


@pytest.fixture
def target(device, backend, monkeypatch):
    """The device and the backend, with a process group of only this process."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    options = {}
    if device == "cuda":
        options["device_id"] = torch.device("cuda", torch.cuda.current_device())
    name = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1, **options)
    yield device, backend
    dist.destroy_process_group()


def network(device, dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64), torch.nn.LayerNorm(64)
    ).to(device, dtype)


def sharded(net, device):
    mesh = init_device_mesh(device, (1,))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def backward(net, step):
    weight = next(net.parameters())
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(step))
    net(x.to(weight.device, weight.dtype)).float().square().sum().backward()


def options_of(target, options):
    return {"lr": 0.02, "weight_decay": 0.1, "backend": target[1], **options}


def assert_same_shards(ours, theirs, passed_over=lambda p: False):
    """Asserts that the weights and states of two optimizers are equal bit by bit.

    Parameters may be shards or whole. Those for which passed_over returns True are skipped.
    """
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for i, (p, q) in enumerate(pairs):
        if passed_over(p):
            continue
        assert same_bits(local(p.detach()), local(q.detach())), f"parameter {i}"
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in ours.state[p].items():
            found, expected = local(value).flatten(), local(theirs.state[q][key]).flatten()
            assert torch.equal(found, expected), f"{key} of parameter {i}"


@each_format
def test_shards_have_the_bits_of_whole_parameters(target, dtype, options):
    device = target[0]
    net = network(device, dtype)
    twin = copy.deepcopy(net)
    sharded(net, device)
    ours = onepass.AdamW(net.parameters(), **options_of(target, options))
    plain = onepass.AdamW(twin.parameters(), **options_of(target, options))
    for step in range(4):
        ours.zero_grad()
        backward(net, step)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert isinstance(p, DTensor)
            q.grad = local(p.grad).clone()
        ours.step()
        plain.step()
        if "max_grad_norm" in options:
            assert torch.equal(ours.grad_norm, plain.grad_norm)
            assert float(ours.grad_norm) > options["max_grad_norm"]
        if "telemetry" in options:
            for name, value in ours.telemetry[0].items():
                assert torch.equal(value, plain.telemetry[0][name]), name
    assert_same_shards(ours, plain)
    if "ema_decay" in options:
        with ours.averaged_weights(), plain.averaged_weights():
            assert_same_shards(ours, plain)


@each_format
def test_a_run_goes_on_from_a_distributed_checkpoint(target, dtype, options, tmp_path):
    device = target[0]

    def made():
        net = sharded(network(device, dtype), device)
        return net, onepass.AdamW(net.parameters(), **options_of(target, options))

    def train(net, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                grad = torch.randn(p.shape, generator=generator).to(device, dtype)
                p.grad = DTensor.from_local(grad, p.device_mesh, p.placements)
            optimizer.step()

    net, optimizer = made()
    train(net, optimizer, range(3))
    found = get_state_dict(net, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), found, strict=True)), checkpoint_id=tmp_path)
    train(net, optimizer, range(3, 5))

    other, resumed = made()
    train(other, resumed, range(7, 8))  # makes states to load into, and weights to replace
    found = get_state_dict(other, resumed)
    state = dict(zip(("model", "optimizer"), found, strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert {float(s["step"]) for s in resumed.state.values()} == {3.0}
    train(other, resumed, range(3, 5))
    # Codes of biases and norms are saved as fp32 values, and may change when they are encoded again
    # (docs/zero.md). The rows of matrices are whole blocks.
    blocks = options.get("states") == "mx8"
    assert_same_shards(resumed, optimizer, passed_over=lambda p: blocks and p.dim() == 1)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert (local(p.detach()) - local(q.detach())).abs().max() <= 2 * 3 * 0.02


def test_a_gradient_that_is_not_finite_skips_the_step(target):
    device = target[0]
    net = sharded(network(device, torch.float32), device)
    options = options_of(target, {"states": "mx8", "skip_nonfinite": True, "max_grad_norm": 1.0})
    optimizer = onepass.AdamW(net.parameters(), **options)
    for step in range(3):
        optimizer.zero_grad()
        backward(net, step)
        before = [local(p).detach().clone() for p in net.parameters()]
        if step == 1:
            local(net[2].weight.grad)[5, 7] = math.nan
        optimizer.step()
        after = [local(p).detach() for p in net.parameters()]
        assert all(map(same_bits, before, after)) == (step == 1)
    assert int(optimizer.skipped_steps) == 1
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
