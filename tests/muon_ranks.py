"""Checks of Muon that several ranks run; see zero_ranks.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard, distribute_tensor

import onepass
from onepass.formats import WEIGHT_FORMATS
from onepass.muon.exchange import owners_of, shard_sizes
from onepass.muon.products import TorchProducts

from .zero_model import LR, backward, make, mesh, sharded, train, whole

STEPS = 3
MASTER = WEIGHT_FORMATS["master"].key


class Counted(TorchProducts):
    """Counts the matrices that it normalizes."""

    matrices = 0

    def normalize(self, x, *args, **kwargs):
        self.matrices += len(x)
        super().normalize(x, *args, **kwargs)


def muon(model, **options):
    return onepass.Muon(onepass.muon_groups(model, LR, LR), **options)


def sharded_pair(dtype=torch.float32, **options):
    """A sharded model and its unsharded twin, each with an optimizer."""
    model = make(dtype)
    twin = copy.deepcopy(model)
    sharded(model)
    return model, muon(model, **options), twin, muon(twin, **options)


def assert_twins(model, optimizer, twin, reference):
    """Weights and momenta differ by the rounding of products in batches of other sizes."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-4, atol=1e-5)
        for key, value in reference.state[q].items():
            torch.testing.assert_close(whole(optimizer.state[p][key]), value, rtol=1e-4, atol=1e-6)


def weights_are_those_of_one_process(directory):
    for options in ({}, {"max_grad_norm": 0.1, "skip_nonfinite": True}, {"paged": True}):
        four = sharded_pair(**options)
        train(*four, STEPS)
        assert_twins(*four)
    four = sharded_pair(torch.bfloat16, weights="master", precision="fp32")
    train(*four, STEPS)
    for p, q in zip(four[0].parameters(), four[2].parameters(), strict=True):
        ours, theirs = (o.state[x][MASTER] for o, x in ((four[1], p), (four[3], q)))
        torch.testing.assert_close(whole(ours), theirs, rtol=1e-4, atol=1e-5)


def each_matrix_is_orthogonalized_once(directory):
    model, optimizer, *rest = sharded_pair()
    counted = Counted()
    optimizer.products = optimizer.products.__class__(None, 1 << 20, counted)
    train(model, optimizer, *rest, 1)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, counted.matrices)
    expected = sum(len(g["params"]) for g in optimizer.param_groups if g.get("use_muon", True))
    assert sum(found) == expected
    assert min(found) > 0  # the work is divided


def batches_and_parts_are_those_of_the_whole(directory):
    """Experts sharded by expert or by column, uneven and empty shards, and split matrices."""
    for shape, dim, options in (
        ((5, 6, 4), 0, {}),
        ((2, 6, 7), 2, {}),
        ((12, 5), 0, {"split": (3, 0)}),
        ((1, 9), 0, {}),
        ((5, 3, 2, 2), 0, {}),
    ):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        plain = torch.nn.Parameter(value.clone())
        param = torch.nn.Parameter(distribute_tensor(value, mesh(), [Shard(dim)]))
        one, two = ([{"params": [p], **options}] for p in (param, plain))
        one, two = onepass.Muon(one, 0.1), onepass.Muon(two, 0.1)
        for step in range(2):
            plain.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            param.grad = distribute_tensor(plain.grad, mesh(), [Shard(dim)])
            one.step()
            two.step()
        torch.testing.assert_close(whole(param), plain, rtol=1e-4, atol=1e-5)


def accumulated_gradients_advance_the_momentum_once(directory):
    model, optimizer, _, _ = sharded_pair()
    for step in range(3):
        backward(model, step)
    optimizer.step()
    for group in optimizer.param_groups[:1]:
        for p in group["params"]:
            buffer = whole(optimizer.state[p]["momentum_buffer"])
            torch.testing.assert_close(buffer, 0.05 * whole(p.grad), rtol=1e-5, atol=1e-9)
            assert optimizer.state[p]["step"] == 1


def several_sharded_dimensions_are_refused(directory):
    if dist.get_world_size() < 2:
        return
    value = torch.zeros(8, 8)
    world = mesh(dist.get_world_size(), 1)
    onepass.Muon([torch.nn.Parameter(distribute_tensor(value, world, [Shard(0), Shard(1)]))])
    if dist.get_world_size() == 4:
        grid = mesh(2, 2)
        param = torch.nn.Parameter(distribute_tensor(value, grid, [Shard(0), Shard(1)]))
        with pytest.raises(ValueError, match="one dimension of their mesh"):
            onepass.Muon([param])


def the_deal_is_balanced(directory):
    assert owners_of([5, 4, 3, 3], 2) == [0, 1, 1, 0]
    assert shard_sizes(5, 3) == [2, 2, 1]
    assert shard_sizes(1, 3) == [1, 0, 0]


def whole_state(model, optimizer):
    """Each weight with its states, unsharded, on every rank."""
    return [
        (whole(p.detach()), {key: whole(value) for key, value in optimizer.state[p].items()})
        for p in model.parameters()
    ]


def save(directory):
    four = sharded_pair()
    train(*four, STEPS)
    model_state, state = get_state_dict(four[0], four[1])
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=directory.parent / "saved")
    found = whole_state(four[0], four[1])
    if dist.get_rank() == 0:
        torch.save(found, directory.parent / "whole.pt")


def load(directory):
    """A checkpoint of another number of ranks has the same bits, and training continues."""
    model, optimizer, twin, _ = sharded_pair()
    model_state, state = get_state_dict(model, optimizer)
    held = {"model": model_state, "optimizer": state}
    dcp.load(held, checkpoint_id=directory.parent / "saved")
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    saved = torch.load(directory.parent / "whole.pt")
    for ours, theirs in zip(whole_state(model, optimizer), saved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    reference = muon(twin)
    for p, (weight, states) in zip(twin.parameters(), saved, strict=True):
        p.detach().copy_(weight)
        reference.state[p] = states
    train(model, optimizer, twin, reference, 1, STEPS)
    assert_twins(model, optimizer, twin, reference)


EVERYWHERE = [
    the_deal_is_balanced,
    weights_are_those_of_one_process,
    each_matrix_is_orthogonalized_once,
    batches_and_parts_are_those_of_the_whole,
    accumulated_gradients_advance_the_momentum_once,
    several_sharded_dimensions_are_refused,
]
