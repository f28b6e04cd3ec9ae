"""The cases of the random runs over several ranks: formats, options, a model, its sharding and
kinds of gradients. See random_ranks.py."""

from __future__ import annotations

import math
import os
import random
from functools import cache

import torch
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CASES, EVERY_FORMAT, served

WITHOUT = set(os.environ.get("ONEPASS_RANDOM_WITHOUT", "").split(","))
LAYOUTS = ("fsdp", "fsdp_root", "fsdp_some", "hsdp", "mixed", "zero")
GRADIENTS = ("replicate", "partial", "other_dim", "pending", "negative", "expanded", "strided")
WITH_WEIGHTS = ("dcp", "dcp_flat", "async", "exchange")
SETTINGS = {
    "max_grad_norm": (None, 0.5, 1e3),
    "norm_type": (2.0, math.inf),
    "skip_nonfinite": (False, True),
    "zero_grads": (False, False, True),
}
FP32 = ("fp32", "native", torch.float32)

# A block that a shard boundary cuts has other scales than in one process. The root mean square of
# the difference may then be this fraction of the root mean square of all updates so far: codes are
# 1/8 apart in mx8 and up to 1/2 in mx4, dynamic8 rounds small values to zero, and the sign of
# Lion's update flips near zero. The largest fraction in 500 cases was 0.24; a lost step is 1.
CUT_BLOCKS = 0.5


def cut_blocks(kind, count):
    """The limit that :data:`CUT_BLOCKS` describes, for an optimizer class and a number of elements.

    If the sign of one element's update flips in Lion, the element moves as far as all others but in
    the opposite direction. If that happens at every step, it adds 2 / sqrt(count) of the root mean
    square of the updates.
    """
    return math.hypot(CUT_BLOCKS, 2 / math.sqrt(count) if kind is onepass.Lion else 0.0)


def allowed(names):
    return [name for name in names if name not in WITHOUT]


class Case:
    """The case of a seed, independent of the number of ranks.

    Args:
        seed: any integer.
        operations: name -> (function, weight of the random choice).
    """

    def __init__(self, seed, operations):
        rng = random.Random(seed)
        self.seed, self.layout = seed, rng.choice(allowed(LAYOUTS))
        row = rng.choice([row for row in CASES if row.name not in WITHOUT])
        self.kind, self.torch = row.ours, row.torch
        chosen = rng.choice(row.options)
        if chosen.get("cautious_weight_decay"):
            chosen = {**chosen, "decoupled_weight_decay": True}
        known = [f for f in EVERY_FORMAT if served(chosen, f[0]) and not WITHOUT & {*f[:2]}]
        states, weights, self.dtype = FP32 if rng.random() < 0.2 else rng.choice(known)
        self.formats = {"states": states, "weights": weights}
        fp32 = (states, weights, self.dtype) == FP32
        # Weight decay that almost cancels a gradient amplifies the rounding errors of fp32.
        decay = 0.0 if fp32 and not self.kind.decoupled else 0.1
        self.options = {"lr": row.lr, "weight_decay": decay, **row.base, **chosen}
        ours = ("eps_in_sqrt", "cautious_weight_decay")  # options that torch does not have
        self.has_oracle = fp32 and self.torch is not None and not any(map(chosen.get, ours))
        self.torch_options = {k: v for k, v in self.options.items() if k not in ours}
        self.extras = {"ema_decay": rng.choice([None, None, 0.9])}
        if rng.random() < 0.3 and "paged" not in WITHOUT:
            self.extras["paged"] = onepass.paging.Paging(0, page_bytes=1 << 14)
        self.settings = {name: rng.choice(values) for name, values in SETTINGS.items()}
        sizes = ("embedding", "linear", "bias"), (1, 2, 3, 32, 33, 65, 96), (1, 3, 8, 32, 33, 64)
        self.parts = [tuple(map(rng.choice, sizes)) for _ in range(rng.randint(1, 4))]
        self.worlds = rng.sample((1, 2, 3), 1 + (rng.random() < 0.4))
        self.moves = [rng.choice(allowed(("dcp", "dcp_flat", "full"))) for _ in self.worlds]
        names = allowed(operations)
        often = [operations[name][1] for name in names]
        self.plan = [rng.choices(names, often, k=rng.randint(3, 6)) for _ in self.worlds]
        # The first step of SGD with dampening is special, so it is skipped in some cases.
        skips = "dampening" in chosen and "skip" in names and rng.random() < 0.5
        self.plan[0].insert(0, "skip" if skips else "step")

    def __str__(self):
        options = {**self.options, **self.formats, **self.extras, **self.settings}
        what = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.kind.__name__}({what}), {self.layout}, {self.dtype}, parts {self.parts}"

    def model(self):
        def part(kind, rows, columns):
            if kind == "embedding":
                return torch.nn.Embedding(rows, columns)
            return torch.nn.Linear(columns, rows, bias=kind == "bias")

        torch.manual_seed(self.seed)
        model = Net()
        model.parts = torch.nn.ModuleList(part(*sizes) for sizes in self.parts)
        return model.to(self.dtype)


class Net(torch.nn.Module):
    def forward(self):
        """Required by fully_shard; only the parameters are used."""


@cache  # each call creates process groups
def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])


def shard(model, case, world):
    """Shards a model according to the layout of the case."""
    rng = random.Random(case.seed)
    copies = rng.choice((1, world))
    over = mesh(copies, world // copies) if case.layout == "hsdp" else mesh(world)
    for part in model.parts:
        if case.layout in ("fsdp", "hsdp") or (case.layout == "fsdp_some" and rng.random() < 0.5):
            fully_shard(part, mesh=over)
        for name, p in list(part.named_parameters()) if case.layout == "mixed" else ():
            kind = rng.choice((Shard(0), Shard(p.dim() - 1), Replicate(), None))
            if kind is not None:
                placed = distribute_tensor(p.detach(), over, [kind])
                part.register_parameter(name, torch.nn.Parameter(placed))
    if case.layout in ("fsdp", "fsdp_root", "hsdp"):
        fully_shard(model, mesh=over)
    if case.layout == "zero":
        onepass.number_parameters(model)


def cuts(p):
    """The sharded dimensions of a parameter, each with its number of ranks."""
    if not isinstance(p, DTensor):
        return []
    pairs = enumerate(p.placements)
    return [(at.dim, p.device_mesh.size(i)) for i, at in pairs if isinstance(at, Shard)]


def has_bits_of_one_process(p, states, weights):
    """Whether docs/zero.md promises the bits of one process for a parameter in these formats."""
    form = STATE_FORMATS[states]
    draws = form.stochastic or WEIGHT_FORMATS[weights].stochastic
    for dim, ranks in cuts(p):
        stretch = ranks == 1 or math.prod(p.shape[:dim]) == 1
        most, inner = -(-p.shape[dim] // ranks), math.prod(p.shape[dim + 1 :])
        starts = range(0, p.shape[dim] * inner, most * inner)
        at_blocks = all(start % form.block == 0 for start in starts)
        if (not stretch and (draws or form.block > 1)) or not at_blocks:
            return False
    return True


def is_saved_as_codes(p, states):
    """Whether a checkpoint stores the states of a parameter as codes instead of fp32 values."""
    block, dims = STATE_FORMATS[states].block, [dim for dim, _ in cuts(p)]
    tails = [math.prod(p.shape[k:]) for k in range(max(dims, default=-1) + 1, p.dim())]
    return block == 1 or not dims or any(size % block == 0 for size in tails)


def local(value):
    """The local tensor of a DTensor; any other tensor is returned as it is."""
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.wait() if isinstance(value, functional.AsyncCollectiveTensor) else value


def part_of(full, like):
    """This rank's part of a full tensor with the placements of `like`, without communication."""
    if not isinstance(like, DTensor):
        return full
    full = full.detach()
    if full.dtype == torch.int16:  # DTensors store int16 as pairs of bytes
        full = full.unsqueeze(-1).view(torch.uint8)
    full = full.reshape(like.shape)
    return local(distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None))


def altered(tensor, kind, solo):
    """The same values as another form of tensor, for some kinds of GRADIENTS."""
    if kind == "pending":
        return functional.all_reduce(tensor, "sum", solo)
    if kind == "negative":
        return torch._neg_view(-tensor)
    if kind == "expanded" and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    return tensor.t().contiguous().t() if kind == "strided" and tensor.dim() == 2 else tensor


def gradient(p, full, kind, solo):
    """A gradient for a parameter, of a kind of GRADIENTS or with the placements of the
    parameter."""
    full = full.clone()
    if not isinstance(p, DTensor):
        return altered(full, kind, solo)
    over, placements = p.device_mesh, list(p.placements)
    if kind == "partial":  # the first rank has the gradient, the others add zeros
        mine = full if not any(over.get_coordinate()) else torch.zeros_like(full)
        return DTensor.from_local(mine, over, [Partial()] * over.ndim, run_check=False)
    if kind in ("replicate", "other_dim"):
        placements = [Replicate()] * over.ndim
    if kind == "other_dim":
        placements[-1] = Shard(p.dim() - 1)
    mine = local(distribute_tensor(full, over, placements, src_data_rank=None))
    sizes = {"shape": full.shape, "stride": full.stride(), "run_check": False}
    return DTensor.from_local(altered(mine, kind, solo), over, placements, **sizes)


def differing(mine, theirs):
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return f"{mine.dtype} {tuple(mine.shape)}, twin {theirs.dtype} {tuple(theirs.shape)}"
    at = (mine != theirs).flatten().nonzero().flatten()
    values = [(int(i), mine.flatten()[i].item(), theirs.flatten()[i].item()) for i in at[:3]]
    return f"{len(at)} of {mine.numel()} elements differ; (index, value, twin's value): {values}"
