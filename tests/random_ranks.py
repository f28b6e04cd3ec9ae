"""A random run over several ranks and the same run in one process; see test_random_ranks.py.

A case follows from its seed: a model, an optimizer and segments of operations. Each segment runs on
its own number of ranks and loads what the segment before it saved. Every rank also runs the case on
full tensors with the same optimizer class (the twin) and, for fp32 training, with torch.optim in
float64 (the oracle).

Gradients are integers below 128 times a power of two. Sums of their squares are exact in float64 in
any order, so the global norm and every clipped step must have the bits of one process too.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CASES, EVERY_FORMAT, same_bits, served

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

# Where a shard boundary cuts a block, its elements share another scale than in one process. The
# root mean square of the difference may then be this fraction of that of all updates so far: codes
# are 1/8 apart in mx8 and up to 1/2 in mx4, dynamic8 rounds small values to zero, and the sign of
# Lion's update flips near zero. The largest of 500 cases was 0.24; a lost step would be 1.
CUT_BLOCKS = 0.5


def allowed(names):
    return [name for name in names if name not in WITHOUT]


class Case:
    """What a seed stands for, whatever the number of ranks."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.seed, self.layout = seed, rng.choice(allowed(LAYOUTS))
        row = rng.choice([row for row in CASES if row.name not in WITHOUT])
        self.kind, self.torch = row.ours, row.torch
        chosen = rng.choice(row.options)
        known = [f for f in EVERY_FORMAT if served(chosen, f[0]) and not WITHOUT & {*f[:2]}]
        states, weights, self.dtype = FP32 if rng.random() < 0.2 else rng.choice(known)
        self.formats = {"states": states, "weights": weights}
        fp32 = (states, weights, self.dtype) == FP32
        # Decay that almost cancels a gradient magnifies the rounding errors of fp32.
        decay = 0.0 if fp32 and not self.kind.decoupled else 0.1
        self.options = {"lr": row.lr, "weight_decay": decay, **row.base, **chosen}
        self.has_oracle = fp32 and self.torch is not None and not chosen.get("eps_in_sqrt")
        self.torch_options = {k: v for k, v in self.options.items() if k != "eps_in_sqrt"}
        self.extras = {"ema_decay": rng.choice([None, None, 0.9])}
        if rng.random() < 0.3 and "paged" not in WITHOUT:
            self.extras["paged"] = onepass.paging.Paging(0, page_bytes=1 << 14)
        self.settings = {name: rng.choice(values) for name, values in SETTINGS.items()}
        sizes = ("embedding", "linear", "bias"), (1, 2, 3, 32, 33, 65, 96), (1, 3, 8, 32, 33, 64)
        self.parts = [tuple(map(rng.choice, sizes)) for _ in range(rng.randint(1, 4))]
        self.worlds = rng.sample((1, 2, 3), 1 + (rng.random() < 0.4))
        self.moves = [rng.choice(allowed(("dcp", "dcp_flat", "full"))) for _ in self.worlds]
        names = allowed(OPERATIONS)
        often = [OPERATIONS[name][1] for name in names]
        self.plan = [rng.choices(names, often, k=rng.randint(3, 6)) for _ in self.worlds]
        # The first step of SGD with dampening differs from the others, so skip it now and then.
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
        """fully_shard wants one; only the parameters are used."""


@cache  # each one makes process groups
def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])


def shard(model, case, world):
    """Applies the layout of the case to a model."""
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
    """The dimensions that a parameter is cut along, and over how many ranks."""
    if not isinstance(p, DTensor):
        return []
    pairs = enumerate(p.placements)
    return [(at.dim, p.device_mesh.size(i)) for i, at in pairs if isinstance(at, Shard)]


def has_bits_of_one_process(p, states, weights):
    """What docs/zero.md promises of a parameter in these formats."""
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
    """Whether a checkpoint has the codes of a parameter's states, rather than fp32 values."""
    block, dims = STATE_FORMATS[states].block, [dim for dim, _ in cuts(p)]
    tails = [math.prod(p.shape[k:]) for k in range(max(dims, default=-1) + 1, p.dim())]
    return block == 1 or not dims or any(size % block == 0 for size in tails)


def local(value):
    """The local tensor of a DTensor; other tensors themselves."""
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.wait() if isinstance(value, functional.AsyncCollectiveTensor) else value


def part_of(full, like):
    """This rank's part of a full tensor, placed as a DTensor is; no rank communicates."""
    if not isinstance(like, DTensor):
        return full
    full = full.detach().reshape(like.shape)
    return local(distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None))


def altered(tensor, kind, solo):
    """A special tensor of the same values, for some kinds of GRADIENTS."""
    if kind == "pending":
        return functional.all_reduce(tensor, "sum", solo)
    if kind == "negative":
        return torch._neg_view(-tensor)
    if kind == "expanded" and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    return tensor.t().contiguous().t() if kind == "strided" and tensor.dim() == 2 else tensor


def gradient(p, full, kind, solo):
    """A gradient for a parameter, of a kind of GRADIENTS or with the placements of its own."""
    full = full.clone()
    if not isinstance(p, DTensor):
        return altered(full, kind, solo)
    over, placements = p.device_mesh, list(p.placements)
    if kind == "partial":  # the first rank has all of it, the others add zeros
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


class Run:
    """A case on full tensors and, after build, on this segment's ranks.

    Attributes:
        sides: parameters and optimizer of the twin, of the oracle if there is one, of the ranks.
        exact: of each parameter, whether it must have the twin's bits.
        paths: of each parameter, the sum of the root mean squares of the twin's updates.
    """

    def __init__(self, case):
        self.case, self.note, self.model, self.steps = case, lambda text: None, None, 0
        self.formats, self.settings = dict(case.formats), dict(case.settings)
        self.twin = list(case.model().parameters())
        extras = {k: v for k, v in case.extras.items() if k != "paged"}
        options = {**case.options, **extras, **self.formats, **self.settings}
        self.reference = case.kind(self.twin, **options)
        doubles = [torch.nn.Parameter(p.detach().double()) for p in self.twin]
        self.oracle = case.torch(doubles, **case.torch_options) if case.has_oracle else None
        self.sides = [(self.twin, self.reference)]
        self.sides += [(doubles, self.oracle)] if self.oracle else []
        self.exact, self.paths = [True] * len(self.twin), [0.0] * len(self.twin)

    def build(self, solo, saving):
        """Makes the model of the ranks. solo: a process group of this rank; saving: of all."""
        self.solo, self.saving, self.model = solo, saving, self.case.model()
        shard(self.model, self.case, dist.get_world_size())
        self.params = list(self.model.parameters())
        self.make_optimizer()

    def make_optimizer(self):
        """Makes the ranks' optimizer, also anew to load a checkpoint into."""
        for p in self.params:
            p.grad = None
        kind = self.case.kind
        if self.case.layout == "zero":
            kind = partial(ZeroRedundancyOptimizer, optimizer_class=kind, norm_group=True)
        options = {**self.case.options, **self.case.extras, **self.formats, **self.settings}
        self.optimizer = kind(self.params, **options)
        self.inner = getattr(self.optimizer, "optim", self.optimizer)
        self.owned = {p for group in self.inner.param_groups for p in group["params"]}
        self.sides = [side for side in self.sides if side[0] is not self.params]
        self.sides.append((self.params, self.inner))
        self.skipped_before, self.judged = int(self.reference.skipped_steps), False

    def drop_oracle(self):
        """Goes on without the oracle, which cannot do what comes."""
        self.sides = [side for side in self.sides if side[1] is not self.oracle]
        self.oracle = None

    def set_options(self, **options):
        for _, optimizer in self.sides:
            outer = self.optimizer if self.model and optimizer is self.inner else optimizer
            for group in outer.param_groups:
                group.update(options)

    def set_settings(self, **settings):
        self.settings.update(settings)
        for _, optimizer in self.sides:
            vars(optimizer).update(settings)

    def lose_bits(self, keeps):
        """Parameters of which keeps is false may differ from the twin from now on."""
        self.exact = [same and keeps(p) for same, p in zip(self.exact, self.params, strict=True)]

    def step(self, fulls, kinds):
        """One step on all sides from the same full gradients, compared."""
        before = [q.detach().double() for q in self.twin]
        for params, _ in self.sides[: 2 if self.oracle else 1]:
            for q, full in zip(params, fulls, strict=True):
                q.grad = None if full is None else full.to(q.dtype, copy=True)
        self.reference.step()
        settings, given = self.settings, [full for full in fulls if full is not None]
        finite = all(full.isfinite().all() for full in given)
        if self.oracle and (finite or not settings["skip_nonfinite"]):
            if settings["max_grad_norm"] is not None:
                clip = torch.nn.utils.clip_grad_norm_
                clip(self.sides[1][0], settings["max_grad_norm"], settings["norm_type"])
            self.oracle.step()
        self.steps += 1
        for i, (q, old) in enumerate(zip(self.twin, before, strict=True)):
            self.paths[i] += float((q.detach().double() - old).square().mean().sqrt())
        if self.model is not None:
            self.lose_bits(lambda p: has_bits_of_one_process(p, **self.formats))
            judges = settings["max_grad_norm"] is not None or settings["skip_nonfinite"]
            self.judged |= judges and bool(given)
            self.step_ranks(fulls, kinds)
            self.compare_params()
            self.compare_gradients(fulls)
            if "norms" not in WITHOUT:
                self.compare_norms()

    def step_ranks(self, fulls, kinds):
        for p, full, kind in zip(self.params, fulls, kinds, strict=True):
            p.grad = None if full is None else gradient(p, full, kind, self.solo)
        self.optimizer.step()

    def compare_params(self):
        for i, (p, q) in enumerate(zip(self.params, self.twin, strict=True)):
            what = f"parameter {i} of shape {tuple(q.shape)}"
            mine, theirs = local(p.detach()), part_of(q.detach(), p)
            size = float(q.detach().abs().max())
            if self.exact[i]:
                assert same_bits(mine, theirs), f"{what}: {differing(mine, theirs)}"
                if p in self.owned:
                    self.compare_states(what, self.inner.state.get(p, {}), self.reference.state[q])
            elif mine.numel():
                gap = float((mine.double() - theirs.double()).square().mean().sqrt())
                # Each step may round a weight to another neighbour.
                limit = CUT_BLOCKS * self.paths[i] + self.steps * torch.finfo(q.dtype).eps * size
                assert gap <= limit, f"{what}: {gap:.2e} from the twin, limit {limit:.2e}"
            if self.oracle:  # a step is off by a few eps of the update and of the weight
                atol = self.steps * (2e-5 * self.case.options["lr"] + 2**-23 * size)
                theirs = part_of(self.sides[1][0][i].detach(), p)
                gap = float((mine.double() - theirs).abs().max()) if mine.numel() else 0.0
                assert gap <= atol, f"{what}: {gap:.2e} from torch.optim, limit {atol:.2e}"

    def compare_states(self, what, ours, theirs):
        assert ours.keys() == theirs.keys(), f"{what} has {[*ours]}, the twin {[*theirs]}"
        for key, value in ours.items():
            # Plain tensors beside DTensors are codes and scales of the shard's own blocks.
            if isinstance(value, DTensor) or key == "step" or self.case.layout == "zero":
                mine = local(value)
                other = part_of(theirs[key], value).reshape(mine.shape)
                assert same_bits(mine, other), f"{key} of {what}: {differing(mine, other)}"

    def compare_gradients(self, fulls):
        """Gradients are only read; with zero_grads they are zero afterwards."""
        for i, (p, full) in enumerate(zip(self.params, fulls, strict=True)):
            if full is None or p not in self.owned:
                continue
            zeroed, grad = self.settings["zero_grads"], local(p.grad)
            assert not (zeroed and grad.any()), f"gradient {i} is not zero after zero_grads"
            if not zeroed and not (isinstance(p.grad, DTensor) and Partial() in p.grad.placements):
                theirs = part_of(full, p.grad)
                same = torch.equal(grad.nan_to_num(), theirs.nan_to_num())
                assert same, f"gradient {i} was changed: {differing(grad, theirs)}"

    def compare_norms(self):
        ours, theirs = (o.grad_norm if self.judged else None for o in (self.inner, self.reference))
        same = ours is theirs or (None not in (ours, theirs) and same_bits(ours, theirs))
        assert same, f"grad_norm is {ours}, the twin's {theirs}"
        skipped = int(self.reference.skipped_steps) - self.skipped_before
        ours = int(self.inner.skipped_steps)
        assert ours == skipped, f"skipped_steps is {ours}, the twin's {skipped}"


# --- operations: functions of the run and of random numbers that the ranks share ---


def gradients(run, rng, infinite=False, missing=False):
    """Full gradients, None where there is none, and kinds of GRADIENTS."""
    fulls, kinds = [], []
    for p in run.twin:
        kinds.append(kind := rng.choice(["own"] * 8 + allowed(GRADIENTS)))
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        shape = (1, *p.shape[1:]) if kind == "expanded" else p.shape
        full = torch.randint(-127, 128, shape, generator=generator) * 2.0 ** -rng.randint(7, 15)
        full[torch.rand(shape, generator=generator) < 0.1] = 0
        fulls.append(full.to(p.dtype).expand(p.shape).contiguous())
    if infinite:
        i = rng.randrange(len(fulls))
        kinds[i] = "own" if kinds[i] == "expanded" else kinds[i]
        fulls[i].view(-1)[rng.randrange(fulls[i].numel())] = rng.choice((math.inf, math.nan))
    if missing:
        for i in rng.sample(range(len(fulls)), rng.randint(1, len(fulls))):
            fulls[i], kinds[i] = None, "none"
    return fulls, kinds


def step(run, rng, infinite=False, missing=False):
    fulls, kinds = gradients(run, rng, infinite, missing)
    if infinite:
        run.set_settings(skip_nonfinite=True)
        at = [(~full.isfinite()).flatten().nonzero().flatten().tolist() for full in fulls]
        run.note(f"skip_nonfinite = True; not finite are elements {at} of the next gradients")
    run.note(f"step with gradients {kinds}")
    run.step(fulls, kinds)


def options(run, rng):
    lr = run.case.options["lr"]
    choices = {"lr": (lr, lr / 4), "weight_decay": (0.0, 0.2), **SETTINGS}
    name = rng.choice(list(choices))
    value = rng.choice(choices[name])
    run.note(f"{name} = {value}")
    (run.set_settings if name in run.settings else run.set_options)(**{name: value})
    if name == "weight_decay" and not run.case.kind.decoupled:
        run.drop_oracle()


def formats(run, rng):
    """Another format of states; a checkpoint before the next step has the old one."""
    known = [name for name in allowed(STATE_FORMATS) if served(run.case.options, name)]
    run.formats["states"] = states = rng.choice(known)
    run.note(f"states = {states!r}")
    run.set_options(states=states)
    if states != "fp32":
        run.drop_oracle()
    if rng.random() < 0.5 and allowed(IN_MEMORY):
        reload(run, rng, IN_MEMORY)
    step(run, rng)  # dcp refuses to load a checkpoint into another format


def replace(run, rng):
    """Other tensors in optimizer.state, or other values in those tensors."""
    i, inplace = rng.randrange(len(run.twin)), rng.random() < 0.3
    # Codes cannot be multiplied: a copy takes their place.
    factor = 0.5 if STATE_FORMATS[run.formats["states"]].block == 1 else None
    run.note(f"states of parameter {i}, {'in place' if inplace else 'replaced'}, times {factor}")
    for params, optimizer in run.sides:
        state = optimizer.state.get(params[i], {})
        for key in [key for _, key, _ in run.reference.rule.slots if key in state]:
            if inplace and factor:
                state[key].mul_(factor)
            elif state[key] is not None:
                state[key] = state[key] * factor if factor else state[key].clone()


def forget(run, rng):
    """The states of a parameter start again."""
    i = rng.randrange(len(run.twin))
    run.note(f"del optimizer.state[parameter {i}]")
    if run.case.kind is onepass.Adagrad:
        run.drop_oracle()  # torch makes Adagrad's states only in the constructor
    for params, optimizer in run.sides:
        optimizer.state.pop(params[i], None)
    step(run, rng)  # torch refuses to save optimizers that lack the states of a parameter


def way(run, how):
    """How, or another way to save if this run does not know it."""
    if run.case.layout == "zero":
        return "consolidate"
    if how == "exchange" and (run.oracle is None or run.case.extras["ema_decay"] is not None):
        return "dcp"
    states = [v for state in run.reference.state.values() for v in state.values()]
    # torch refuses to load full state dicts without any tensor of at least one dimension.
    return how if how != "full" or any(v.dim() for v in states if v is not None) else "dcp"


def reload(run, rng, ways=None):
    """Saves, maybe takes a step that is lost, and loads into a new optimizer."""
    how, lost = way(run, rng.choice(allowed(ways or WAYS))), rng.random() < 0.5
    fulls, kinds = gradients(run, rng)
    run.note(f"save by {how}, {f'lose a step with {kinds}, ' if lost else ''}load anew")
    if run.model is None:
        return
    path = str(run.path / f"{run.steps}-{rng.getrandbits(32)}")
    weights = [local(p.detach()).clone() for p in run.params]
    saved = save(run, how, path)
    if lost:
        run.step_ranks(fulls, kinds)
    if how == "async":
        saved.result()
    with torch.no_grad():
        for p, value in zip(run.params, weights, strict=True):
            local(p).copy_(torch.zeros_like(value) if how in WITH_WEIGHTS else value)
    load(run, how, path, saved)


def whole(run, how):
    """Model and optimizer as torch.distributed.checkpoint takes them."""
    flat = StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat")
    model, optimizer = state_dicts.get_state_dict(run.model, run.optimizer, options=flat)
    return {"model": model, "optimizer": optimizer}


def load_whole(run, how, path):
    dcp.load(state := whole(run, how), checkpoint_id=path)
    flat = StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat")
    loaded = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    state_dicts.set_state_dict(run.model, run.optimizer, **loaded, options=flat)


def torch_saved(state):
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


IN_MEMORY = {  # name: how a state dict is saved and loaded
    "torch_save": (torch_saved, lambda saved: torch.load(io.BytesIO(saved), weights_only=False)),
    "pickle": (pickle.dumps, pickle.loads),
    "deepcopy": (copy.deepcopy, copy.deepcopy),
}
# direct: dcp of optimizer.state_dict(); exchange: dcp to torch.optim and back.
WAYS = (*IN_MEMORY, *WITH_WEIGHTS, "direct", "full")


def save(run, how, path):
    """Saves the states, and the weights too if how is one of WITH_WEIGHTS."""
    if how in IN_MEMORY:
        return IN_MEMORY[how][0](run.optimizer.state_dict())
    if how == "direct":
        return dcp.save({"optimizer": run.optimizer.state_dict()}, checkpoint_id=path)
    if how in WITH_WEIGHTS:
        write = dcp.async_save if how == "async" else dcp.save
        return write(whole(run, how), checkpoint_id=path, process_group=run.saving)
    # What the others return may share memory with the states.
    if how == "full":
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        got = state_dicts.get_optimizer_state_dict(run.model, run.optimizer, options=full)
        return copy.deepcopy(got)
    run.optimizer.consolidate_state_dict(0)
    found = [copy.deepcopy(run.optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def load(run, how, path, saved):
    """Loads what save saved into a new optimizer."""
    old = run.optimizer.state_dict() if how == "direct" else None
    run.make_optimizer()
    if how == "exchange":
        run.optimizer = run.case.torch(run.params, **run.case.torch_options)
        load_whole(run, how, path)
        path += "-torch"
        save(run, how, path)
        run.make_optimizer()
    if how in WITH_WEIGHTS:
        load_whole(run, how, path)
    elif how == "full":
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state_dicts.set_optimizer_state_dict(run.model, run.optimizer, saved, options=spread)
    else:
        if how == "direct":
            dcp.load(state := {"optimizer": old}, checkpoint_id=path)
            saved = state["optimizer"]
        saved = IN_MEMORY[how][1](saved) if how in IN_MEMORY else saved
        run.optimizer.load_state_dict(saved)
    run.lose_bits(lambda p: is_saved_as_codes(p, run.formats["states"]))


OPERATIONS = {  # name: the function and how often it is chosen
    "step": (step, 6),
    "missing": (partial(step, missing=True), 2),
    "skip": (partial(step, infinite=True), 2),
    "options": (options, 2),
    "formats": (formats, 1),
    "replace": (replace, 1),
    "forget": (forget, 1),
    "reload": (reload, 4),
}


def leave(run, how):
    """Saves a run for another number of ranks."""
    run.note(f"save by {how} for another number of ranks")
    saved = save(run, how, str(run.path / "moved"))
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in run.params]
    if dist.get_rank() == 0:
        saved = None if how in WITH_WEIGHTS else saved
        torch.save((saved, [w.detach() for w in weights], run.exact), run.path / "moved.pt")


def enter(run, how):
    """Goes on from what another number of ranks saved."""
    run.note(f"load on {dist.get_world_size()} ranks what was saved by {how}")
    saved, weights, run.exact = torch.load(run.path / "moved.pt", weights_only=False)
    with torch.no_grad():
        for p, value in zip(run.params, weights, strict=True):
            local(p).copy_(part_of(value, p) * (how not in WITH_WEIGHTS))
    load(run, how, str(run.path / "moved"), saved)


def play(seed, segment, path, note, *groups):
    """Runs a segment of a case on all ranks; raises where they do not do what one process does."""
    case = Case(seed)
    run = Run(case)
    run.path = path
    for number, plan in enumerate(case.plan[: segment + 1]):
        if number == segment:
            run.note = note
            note(f"{dist.get_world_size()} ranks: {case}")
            run.build(*groups)
            if segment:
                enter(run, way(run, case.moves[segment - 1]))
        for index, name in enumerate(plan):
            OPERATIONS[name][0](run, random.Random(f"{seed}/{number}/{index}"))
    if segment + 1 < len(case.plan):
        leave(run, way(run, case.moves[segment]))
