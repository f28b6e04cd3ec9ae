"""The model that the ranks train together, and the same training in one process."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BATCH, TOKENS, VOCABULARY, WIDTH = 12, 5, 50, 32
LR = 1e-2


class Model(torch.nn.Module):
    """A small transformer whose parameters shard unevenly.

    50 rows are uneven on 3 and 4 ranks, and the 2 rows of the head leave some ranks empty. Rows of
    32 and 64 elements are whole blocks of mx8, rows of 48 are not.
    """

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.narrow = torch.nn.Linear(WIDTH, 48)
        self.head = torch.nn.Linear(48, 2)
        self.out = torch.nn.Linear(2, VOCABULARY)

    def forward(self, tokens):
        hidden = torch.tanh(self.narrow(self.layer(self.embedding(tokens))))
        return self.out(self.head(hidden))


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(model, over=None):
    over = over or mesh()
    for part in (model.embedding, model.layer, model.narrow):
        fully_shard(part, mesh=over)
    return fully_shard(model, mesh=over)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_of(model, step, parts=1, part=0):
    """The loss of a batch, or of one rank's part of it. The mean over ranks is the loss of the
    batch."""
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=_generator(step))
    mine = tokens.chunk(parts)[part]
    logits = model(mine).float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())


def _generator(step):
    return torch.Generator().manual_seed(step)


def backward(model, step):
    """Computes this rank's part of the gradients of a step; without ranks, the full gradients."""
    loss_of(model, step, dist.get_world_size(), dist.get_rank()).backward()


def copy_gradients(model, twin):
    """Gives an unsharded model the full gradients of a sharded one."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else whole(p.grad).clone()


def pair(optimizer, dtype=torch.float32, over=None, **options):
    """A sharded model and its unsharded twin, each with an optimizer."""
    model = make(dtype)
    twin = copy.deepcopy(model)
    sharded(model, over)
    return (
        model,
        optimizer(model.parameters(), lr=LR, **options),
        twin,
        optimizer(twin.parameters(), lr=LR, **options),
    )


def train(model, optimizer, twin, reference, steps, first=0):
    """Trains both models with the gradients of the sharded one."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        copy_gradients(model, twin)
        optimizer.step()
        reference.step()


def at_blocks(param, block=32):
    """Whether the shard of every rank starts at a block boundary."""
    local = getattr(param, "_local_tensor", param)
    cuts = [None] * dist.get_world_size()
    dist.all_gather_object(cuts, local.numel())
    return all(sum(cuts[:rank]) % block == 0 for rank, size in enumerate(cuts) if size)


def same_as_twin(model, optimizer, twin, reference, block=1):
    """Asserts that weights and states of parameters cut at blocks equal those of the twin.

    Returns:
        The number of parameters that were compared.
    """
    compared = 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if not at_blocks(p, block):
            continue
        compared += 1
        assert torch.equal(whole(p), q)
        ours, theirs = optimizer.state[p], reference.state[q]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, DTensor) or value.dim() == 0:
                assert torch.equal(whole(value).flatten(), theirs[key].flatten()), key
    return compared


def everywhere(value):
    """A list of the values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
