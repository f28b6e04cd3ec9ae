"""Checks that all ranks run: FSDP2, ZeRO-1, DDP, norms and step counters."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import onepass
from onepass.memory.models import of_module
from onepass.memory.predict import storage_bytes
from onepass.memory.scenarios import Terms, candidate
from onepass.memory.scenarios import predicted as of_terms
from onepass.memory.shards import parse_mesh

from . import zero_model
from .zero_model import LR, backward, everywhere, make, mesh, pair, same_as_twin, train, whole

BF16 = torch.bfloat16


def elementwise_formats_have_the_bits_of_one_process(directory, checkpoints):
    for optimizer, dtype, options in (
        (onepass.AdamW, torch.float32, {"amsgrad": True}),
        (onepass.AdamW, BF16, {"states": "bf16", "weights": "stochastic"}),
        (onepass.Lion, torch.float32, {"states": "bf16", "ema_decay": 0.9}),
        (onepass.SGD, BF16, {"momentum": 0.9, "weights": "split8"}),
        (onepass.RMSprop, BF16, {"weights": "kahan", "momentum": 0.5}),
    ):
        four = pair(optimizer, dtype, **options)
        train(*four, 2)
        assert same_as_twin(*four) == len(list(four[0].parameters()))


def block_formats_have_them_where_shards_are_cut_at_blocks(directory, checkpoints):
    for optimizer, states in (
        (onepass.AdamW, "mx8"),
        (onepass.AdamW, "mx4"),
        (onepass.Lion, "mx8"),
    ):
        four = pair(optimizer, states=states)
        train(*four, 3)
        assert same_as_twin(*four, block=32) >= 5
        # In the other parameters different elements share a scale, so steps differ within the
        # precision of the format.
        for p, q in zip(four[0].parameters(), four[2].parameters(), strict=True):
            assert (whole(p) - q).abs().max() < (2 if optimizer is onepass.Lion else 1) * 3 * LR


def schedule_free_modes_have_the_bits_of_one_process(directory, checkpoints):
    for dtype, options, block in (
        (torch.float32, {"states": "mx8"}, 32),
        (BF16, {"weights": "kahan"}, 1),
    ):
        four = pair(onepass.AdamWScheduleFree, dtype, **options)
        train(*four, 2)
        for mode in ("eval", "train"):
            for one in four[1::2]:
                getattr(one, mode)()
            assert same_as_twin(*four, block=block) >= 5
        train(*four, 1, first=2)
        assert same_as_twin(*four, block=block) >= 5


def states_are_dtensors_of_the_same_placement(directory, checkpoints):
    model, optimizer, *_ = four = pair(onepass.AdamW, BF16, states="mx8", weights="split16")
    train(*four, 1)
    for p in model.parameters():
        # int16 is stored as pairs of bytes, because process groups cannot send int16.
        for key, more in (("exp_avg", ()), ("exp_avg_sq", ()), ("weight_low", (2,))):
            value = optimizer.state[p][key]
            assert value.placements == p.placements
            assert value.shape == (*p.shape, *more)
            assert value.to_local().shape == (*p.to_local().shape, *more)
    scale = optimizer.state[model.embedding.weight]["exp_avg_scale"]
    assert (scale.shape, scale.placements) == ((50, 1), (Shard(0),))
    assert not isinstance(optimizer.state[model.head.weight]["exp_avg_scale"], DTensor)


def bytes_per_rank_are_a_share_of_the_whole(directory, checkpoints):
    model, optimizer, *_ = four = pair(onepass.AdamW, states="mx8")
    train(*four, 1)
    for p in model.parameters():
        n = p.to_local().numel()
        held = [v for k, v in optimizer.state[p].items() if k != "step"]
        local = [v.to_local() if isinstance(v, DTensor) else v for v in held]
        assert sum(v.numel() * v.element_size() for v in local) == 2 * (n + math.ceil(n / 32))


def bytes_per_rank_are_as_predicted(directory, checkpoints):
    """`onepass memory --mesh` predicts the bytes on the rank that holds the most."""
    world = dist.get_world_size()
    for name, states, weights in (
        ("adamw", "fp32", "native"),
        ("adamw+mx8+split8", "mx8", "split8"),
        ("adamw+bf16+stochastic", "bf16", "stochastic"),
        ("lion8bit", "mx8", "native"),
    ):
        kind = onepass.Lion if "lion" in name else onepass.AdamW
        options = {"states": states, "weights": weights}
        for sharding in ("fsdp", "zero1"):
            model = make(BF16)
            terms = Terms(mesh=parse_mesh({sharding: world}))
            predicted = of_terms(candidate(name), of_module(model, "model"), terms)
            if sharding == "fsdp":
                trained = zero_model.sharded(model)
                optimizer = inner = kind(model.parameters(), lr=LR, **options)
            else:
                trained = DistributedDataParallel(model)
                optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, lr=LR, **options)
                inner = optimizer.optim
            backward(trained, 0)
            optimizer.step()
            params = [getattr(p, "_local_tensor", p) for p in model.parameters()]
            grads = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
            states_ = [v for state in inner.state.values() for v in state.values()]
            states_ = [getattr(v, "_local_tensor", v) for v in states_]
            for what, tensors in (("weights", params), ("gradients", grads)):
                held = everywhere(sum(t.numel() * t.element_size() for t in tensors))
                assert max(held) == getattr(predicted, what), (name, sharding, what)
            held = everywhere(storage_bytes(states_))
            assert max(held) == predicted.moments + predicted.companions, (name, sharding)


def paged_states_have_the_bits_of_those_that_are_not(directory, checkpoints):
    for states, weights, budget in (("fp32", "native", 0), ("mx8", "split8", 1 << 14)):
        options = {"lr": LR, "states": states, "weights": weights, "max_grad_norm": 0.1}
        options |= {"skip_nonfinite": True, "ema_decay": 0.9}
        paging = onepass.paging.Paging(budget, page_bytes=1 << 14)
        models = [zero_model.sharded(make(BF16)) for _ in range(2)]
        paged = onepass.AdamW(models[0].parameters(), paged=paging, **options)
        plain = onepass.AdamW(models[1].parameters(), **options)
        for step in range(4):
            for model, optimizer in zip(models, (paged, plain), strict=True):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
            if step == 1:  # save, and load into the other optimizer
                saved = paged.state_dict(), plain.state_dict()
                paged = onepass.AdamW(models[0].parameters(), paged=paging, **options)
                plain = onepass.AdamW(models[1].parameters(), **options)
                paged.load_state_dict(saved[1])
                plain.load_state_dict(saved[0])
        (footprint,) = onepass.paging.footprints(paged).values()
        assert footprint.ring > 0
        assert footprint.host > 0
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
            ours, theirs = paged.state[p], plain.state[q]
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert isinstance(value, DTensor) == isinstance(theirs[key], DTensor), key
                value, other = (getattr(v, "_local_tensor", v) for v in (value, theirs[key]))
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), key


def clipping_is_by_the_norm_over_all_ranks(directory, checkpoints):
    for norm_type in (2.0, math.inf):
        options = {"max_grad_norm": 1e-2, "norm_type": norm_type}
        model, optimizer, twin, reference = four = pair(onepass.AdamW, **options)
        train(*four, 3)
        assert len(set(everywhere(float(optimizer.grad_norm)))) == 1
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=2e-6, atol=0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(whole(p), q, rtol=1e-5, atol=3e-3 * LR)


def copies_count_once(directory, checkpoints):
    """HSDP on four ranks, else a mesh with one copy, with sharded and unsharded parameters."""
    world = dist.get_world_size()
    rows = 2 if world == 4 else 1
    over = mesh(rows, world // rows, names=("copies", "shards"))
    model, optimizer, _, reference = four = pair(onepass.AdamW, over=over, max_grad_norm=1e-2)
    train(*four, 2)
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=2e-6, atol=0)
    weights = [whole(p).detach() for p in model.parameters()]
    for others in everywhere(weights):
        assert all(map(torch.equal, others, weights))

    values = [torch.randn(6, 8), torch.randn(4, 4), torch.randn(7, 3), torch.randn(3)]
    kinds = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Replicate(), Replicate()), None]
    params, plain = [], []
    for value, kind in zip(values, kinds, strict=True):
        plain.append(torch.nn.Parameter(value.clone()))
        plain[-1].grad = value * 2
        placed = value if kind is None else distribute_tensor(value, over, kind)
        params.append(torch.nn.Parameter(placed.clone()))
        params[-1].grad = placed * 2
    ours, theirs = (onepass.AdamW(p, max_grad_norm=1.0, telemetry=True) for p in (params, plain))
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=2e-6, atol=0)
    for name, value in theirs.telemetry[0].items():
        torch.testing.assert_close(ours.telemetry[0][name], value, rtol=2e-6, atol=0)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-5, atol=1e-6)


def gradients_of_other_placements_are_brought_to_the_parameters(directory, checkpoints):
    over = mesh()
    world, rank = dist.get_world_size(), dist.get_rank()
    value, grad = torch.randn(8, 6), torch.randn(8, 6)
    plain = torch.nn.Parameter(value.clone())
    cut = torch.nn.Parameter(distribute_tensor(value, over, [Shard(0)]))
    copied = torch.nn.Parameter(distribute_tensor(value, over, [Replicate()]))
    ours, theirs = onepass.AdamW([cut, copied]), onepass.AdamW([plain])
    for step in range(3):
        plain.grad = grad * step
        cut.grad = distribute_tensor(grad * step, over, [Shard(1)])
        mine = grad * step if rank == world - 1 else torch.zeros_like(grad)
        copied.grad = DTensor.from_local(mine, over, [Partial()], run_check=False)
        ours.step()
        theirs.step()
    assert torch.equal(whole(cut), plain)
    assert torch.equal(whole(copied), plain)


def one_bad_gradient_skips_the_step_on_all_ranks(directory, checkpoints):
    model, optimizer, *_ = pair(onepass.AdamW, skip_nonfinite=True)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        if step == 1:
            before = [p.to_local().clone() for p in model.parameters()]
            model.head.weight.grad.to_local()[:1] = math.inf  # no effect on ranks with empty shards
        optimizer.step()
        if step == 1:
            same = map(torch.equal, before, (p.to_local() for p in model.parameters()))
            assert all(same)
    assert everywhere(int(optimizer.skipped_steps)) == [1] * dist.get_world_size()
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert everywhere(steps) == [{2.0}] * dist.get_world_size()


def loss_scalers_agree_on_all_ranks(directory, checkpoints):
    for kind in (onepass.GradScaler, torch.amp.GradScaler):
        model, optimizer, *_ = pair(onepass.AdamW, fused=True)
        scaler = kind("cpu", init_scale=1024.0)
        for step in range(3):
            optimizer.zero_grad()
            loss = zero_model.loss_of(model, step, dist.get_world_size(), dist.get_rank())
            scaler.scale(loss).backward()
            grad = model.embedding.weight.grad.to_local()
            if step == 1 and dist.get_rank() == 0:
                grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
        assert everywhere(scaler.get_scale()) == [512.0] * dist.get_world_size()
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert everywhere(steps) == [{2.0}] * dist.get_world_size()


def runs_end_where_one_process_does(directory, checkpoints):
    """FSDP2, ZeRO-1 and DDP with clipping; each rank has its part of the batch."""
    single = make()
    reference = onepass.AdamW(single.parameters(), lr=LR, max_grad_norm=0.1, eps=1e-4)
    for step in range(4):
        reference.zero_grad()
        zero_model.loss_of(single, step).backward()
        reference.step()
    options = {"lr": LR, "max_grad_norm": 0.1, "eps": 1e-4}
    for kind in ("fsdp2", "zero1", "ddp"):
        model = make()
        if kind == "fsdp2":
            trained = zero_model.sharded(model)
            optimizer = onepass.AdamW(model.parameters(), **options)
        else:
            trained = DistributedDataParallel(model)
            optimizer = onepass.AdamW(model.parameters(), **options)
        if kind == "zero1":
            optimizer = ZeroRedundancyOptimizer(
                model.parameters(), onepass.AdamW, norm_group=True, **options
            )
        for step in range(4):
            optimizer.zero_grad()
            backward(trained, step)
            optimizer.step()
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(p), q, rtol=1e-4, atol=1e-2 * LR)


def zero1_has_the_bits_of_one_optimizer(directory, checkpoints):
    for dtype, options in (
        (BF16, {"states": "bf16", "weights": "stochastic"}),
        (BF16, {"states": "mx8"}),
    ):
        model, twin = make(dtype), make(dtype)
        onepass.number_parameters(model)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), onepass.AdamW, lr=LR, **options)
        reference = onepass.AdamW(twin.parameters(), lr=LR, **options)
        trained = DistributedDataParallel(model)
        for step in range(4):
            optimizer.zero_grad()
            backward(trained, step)
            zero_model.copy_gradients(model, twin)
            optimizer.step()
            reference.step()
            if step == 1:  # save and load between steps
                optimizer.consolidate_state_dict(0)
                saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
                dist.broadcast_object_list(saved)
                optimizer = ZeroRedundancyOptimizer(
                    model.parameters(), onepass.AdamW, lr=LR, **options
                )
                optimizer.load_state_dict(saved[0])
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


def counters_do_not_drift(directory, checkpoints):
    """Frozen parameters, groups that are empty on a rank, and parameters without a gradient."""
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
    model[2].bias.requires_grad_(False)
    groups = [
        {"params": list(model[0].parameters()), "lr": LR},
        {"params": list(model[1].parameters()), "betas": (0.8, 0.9)},
        {"params": [p for p in model[2].parameters() if p.requires_grad], "weight_decay": 0.0},
    ]
    ddp = DistributedDataParallel(Alternating(model), find_unused_parameters=True)
    optimizer = ZeroRedundancyOptimizer(groups, onepass.AdamW, norm_group=True, max_grad_norm=1.0)
    twin = [torch.nn.Parameter(p.detach().clone()) for g in groups for p in g["params"]]
    reference = onepass.AdamW(twin, max_grad_norm=1.0)
    for group, size in zip(groups, (2, 2, 1), strict=True):
        assert len(group["params"]) == size
    for step in range(4):
        optimizer.zero_grad()
        ddp(torch.ones(2, 4) * (step + 1), step).backward()
        for p, q in zip((p for g in groups for p in g["params"]), twin, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
    inner = optimizer.optim
    own = {id(p): float(s["step"]) for p, s in inner.state.items() if "step" in s}
    counts = [own.get(id(p)) for g in groups for p in g["params"]]
    known = [{c for c in each if c is not None} for each in zip(*everywhere(counts), strict=True)]
    assert known == [{float(reference.state[q]["step"])} for q in twin]
    assert len({float(reference.state[q]["step"]) for q in twin}) == 2


class Alternating(torch.nn.Module):
    """Uses parts[1] on odd steps and on the first rank only."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x, step):
        x = self.parts[2](self.parts[0](x))
        return (self.parts[1](x) if step % 2 and dist.get_rank() == 0 else x).square().mean()


EVERYWHERE = [
    elementwise_formats_have_the_bits_of_one_process,
    block_formats_have_them_where_shards_are_cut_at_blocks,
    schedule_free_modes_have_the_bits_of_one_process,
    states_are_dtensors_of_the_same_placement,
    bytes_per_rank_are_a_share_of_the_whole,
    bytes_per_rank_are_as_predicted,
    paged_states_have_the_bits_of_those_that_are_not,
    clipping_is_by_the_norm_over_all_ranks,
    copies_count_once,
    gradients_of_other_placements_are_brought_to_the_parameters,
    one_bad_gradient_skips_the_step_on_all_ranks,
    loss_scalers_agree_on_all_ranks,
    runs_end_where_one_process_does,
    zero1_has_the_bits_of_one_optimizer,
    counters_do_not_drift,
]
