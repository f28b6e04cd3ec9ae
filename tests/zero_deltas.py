"""Checks that all ranks run: patches of the changed weights of sharded models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import onepass

from .support.thorough import THOROUGH
from .zero_model import backward, make, mesh, sharded, whole

BF16 = torch.bfloat16


def gathered(model, optimizer):
    """The patch of all ranks, merged, on every rank."""
    part = onepass.take_delta(model, optimizer)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    assert len({(p.id, p.predecessor) for p in parts}) == 1
    merged = parts[0]
    for other in parts[1:]:
        merged = onepass.merge_deltas(merged, other)
    return merged, parts


def same(model, server):
    """Whether a server has the weights of a sharded model, byte for byte."""
    return all(
        torch.equal(whole(p.detach()).view(torch.int16), server[name].view(torch.int16))
        for name, p in model.named_parameters()
        if p.numel()
    )


def patches_keep_a_server_equal(directory, checkpoints):
    for options in ({"states": "mx8", "weights": "stochastic"}, {"weights": "split8"}):
        model = make(BF16)
        server = copy.deepcopy(model.state_dict())
        model.out.bias.requires_grad_(False)
        sharded(model)
        optimizer = onepass.AdamW(model.parameters(), lr=1e-5, track_changes=True, **options)
        for number in range(50 if THOROUGH and "states" in options else 5):
            backward(model, number)
            optimizer.step()
            optimizer.zero_grad()
            if number % 5 == 3:
                continue
            if number == 2:
                with torch.no_grad():
                    model.head.weight.mul_(2)
            delta, parts = gathered(model, optimizer)
            if dist.get_world_size() > 1:
                with pytest.raises(ValueError, match="merge the parts"):
                    onepass.apply_delta(server, parts[0])
            onepass.apply_delta(server, delta)
            assert same(model, server)
            assert number != 2 or delta.changes["head.weight"].complete
            assert not delta.changes["embedding.weight"].complete
            assert 0 < delta.numel < sum(p.numel() for p in model.parameters()) / 2


def replicas_report_once(directory, checkpoints):
    size = dist.get_world_size()
    over = mesh(1, size, names=("copies", "shards")) if size % 2 else mesh(2, size // 2)
    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, placements in (
        ("rows", (Replicate(), Shard(0))),
        ("columns", (Replicate(), Shard(1))),
        ("copies", (Replicate(), Replicate())),
    ):
        weight = distribute_tensor(torch.randn(13, 9).to(BF16), over, placements)
        model.register_parameter(name, torch.nn.Parameter(weight))
    model.plain = torch.nn.Parameter(torch.ones(5, dtype=BF16))
    server = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    optimizer = onepass.SGD(model.parameters(), lr=1e-3, track_changes=True)
    for _ in range(2):
        for p in model.parameters():
            grad = torch.randn(p.shape).to(BF16)
            p.grad = distribute_tensor(grad, over, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
        delta, parts = gathered(model, optimizer)
        onepass.apply_delta(server, delta)
        assert same(model, server)
        assert sum(part.numel for part in parts) == delta.numel


EVERYWHERE = [patches_keep_a_server_equal, replicas_report_once]
