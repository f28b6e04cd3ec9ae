"""One random run over several ranks, and the same run in one process; see test_random_ranks.py.

A case is a function of its seed: the model, the optimizer, and a plan of operations in segments. A
segment runs on its own number of ranks and goes on from what the segment before it saved. Every
rank also runs the whole case on full tensors with the same optimizer class (the twin) and, for fp32
training, with torch.optim in float64 (the oracle).

Gradients are small integers times a power of two, and one power per tensor. Sums of their squares
are then exact in float64 in any order, so that the global norm, and with it every clipped step, has
the bits of one process too.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CASES, EVERY_FORMAT, same_bits, served

WITHOUT = set(filter(None, os.environ.get("ONEPASS_RANDOM_WITHOUT", "").split(",")))
"""Names of operations, gradients, layouts, ways to save, formats and options to leave out."""

LAYOUTS = ("fsdp", "fsdp_root", "fsdp_some", "hsdp", "mixed", "zero")
GRADIENTS = ("replicate", "partial", "other_dim", "pending", "negative", "expanded", "strided")
IN_MEMORY = ("torch_save", "pickle", "deepcopy", "direct", "full")
WITH_WEIGHTS = ("dcp", "dcp_flat", "async")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

# Blocks that are cut by a shard's boundary share other scales than those of one process. The
# largest distance allowed between the two runs, as a fraction of the root mean square of the
# updates so far: codes are 1/8 apart in mx8, up to 1/2 in mx4, and dynamic8 rounds small values to
# zero; the sign of Lion's update flips near zero. Independent paths would reach sqrt(2).
CUT_BLOCKS = 1.0


def allowed(names):
    """The names that ONEPASS_RANDOM_WITHOUT does not leave out."""
    return [name for name in names if name not in WITHOUT]


class Case:
    """What a seed stands for; it does not depend on the number of ranks."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.seed = seed
        self.layout = rng.choice(allowed(LAYOUTS))
        row = rng.choice([case for case in CASES if case.name not in WITHOUT])
        self.kind, self.torch = row.ours, row.torch
        options = rng.choice(row.options)
        known = [f for f in EVERY_FORMAT if served(options, f[0]) and not WITHOUT & {*f[:2]}]
        plain = [f for f in known if f == ("fp32", "native", torch.float32)]
        states, weights, self.dtype = rng.choice(plain if plain and rng.random() < 0.3 else known)
        self.options = {"lr": row.lr, "weight_decay": 0.1, **row.base, **options}
        self.options |= {"states": states, "weights": weights}
        self.options["ema_decay"] = rng.choice([None, None, 0.9])
        self.settings = {
            "max_grad_norm": rng.choice([None, 0.5, 1e3]),
            "norm_type": rng.choice([2.0, math.inf]),
            "skip_nonfinite": rng.random() < 0.5,
            "zero_grads": rng.random() < 0.3,
        }
        self.paged = rng.choice([False, False, "paged"]) if "paged" not in WITHOUT else False
        rows, columns = (1, 2, 3, 32, 33, 65, 96), (1, 3, 8, 32, 33, 64)
        self.parts = [
            (rng.choice(("embedding", "linear", "bias")), rng.choice(rows), rng.choice(columns))
            for _ in range(rng.randint(1, 4))
        ]
        self.worlds = rng.sample((1, 2, 3), 1 + (rng.random() < 0.4))
        self.moves = [rng.choice(allowed(("dcp", "dcp_flat", "full"))) for _ in self.worlds]
        kinds = [name for name in OPERATIONS if name not in WITHOUT]
        weights = [OPERATIONS[name][1] for name in kinds]
        first = "skip" if options.get("dampening") and rng.random() < 0.5 else "step"
        self.plan = [rng.choices(kinds, weights, k=rng.randint(3, 6)) for _ in self.worlds]
        self.plan[0].insert(0, first if first not in WITHOUT else "step")

    def __str__(self):
        return (
            f"seed {self.seed}: {self.kind.__name__} {self.options} {self.settings} {self.dtype} "
            f"{'paged ' if self.paged else ''}{self.layout}, parts {self.parts}, "
            f"ranks {self.worlds}"
        )

    def optimizer(self, params, formats, settings, sharded=True):
        """The optimizer over parameters, as it is made anew after a checkpoint."""
        options = {**self.options, **settings, **formats}
        if sharded and self.paged:
            options["paged"] = onepass.paging.Paging(0, page_bytes=1 << 14)
        if sharded and self.layout == "zero":
            return ZeroRedundancyOptimizer(params, self.kind, norm_group=True, **options)
        return self.kind(params, **options)

    def oracle(self, params):
        """torch.optim's twin in float64; None where it does not do the same."""
        o = dict(self.options)
        plain = (o.pop("states"), o.pop("weights"), self.dtype)
        o.pop("ema_decay")
        if self.torch is None or o.pop("eps_in_sqrt", False):
            return None
        return self.torch(params, **o) if plain == ("fp32", "native", torch.float32) else None


class Net(torch.nn.Module):
    """Modules of the case's parts; only their parameters are used."""

    def __init__(self, case):
        super().__init__()
        make = {
            "embedding": torch.nn.Embedding,
            "linear": lambda rows, columns: torch.nn.Linear(columns, rows, bias=False),
            "bias": lambda rows, columns: torch.nn.Linear(columns, rows),
        }
        torch.manual_seed(case.seed)
        self.parts = torch.nn.ModuleList(make[kind](*sizes) for kind, *sizes in case.parts)
        self.to(case.dtype)

    def forward(self):
        raise NotImplementedError


_meshes = {}


def mesh(*shape):
    """A mesh of a shape; kept, because each one makes process groups."""
    if shape not in _meshes:
        names = ("copies", "shards")[-len(shape) :]
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[shape]


def shard(model, case, world):
    """Applies the layout of the case to a model on as many ranks as world."""
    rng = random.Random(f"{case.seed}/layout")
    copies = rng.choice((1, world))
    over = mesh(copies, world // copies) if case.layout == "hsdp" else mesh(world)
    if case.layout in ("fsdp", "fsdp_some", "hsdp"):
        for part in model.parts:
            if case.layout != "fsdp_some" or rng.random() < 0.5:
                fully_shard(part, mesh=over)
    if case.layout in ("fsdp", "fsdp_root", "hsdp"):
        fully_shard(model, mesh=over)
    if case.layout == "mixed":
        for part in model.parts:
            for name, p in list(part.named_parameters()):
                kind = rng.choice((Shard(0), Shard(p.dim() - 1), Replicate(), None))
                if kind is not None:
                    placed = distribute_tensor(p.detach(), over, [kind])
                    part.register_parameter(name, torch.nn.Parameter(placed))
    if case.layout == "zero":
        onepass.number_parameters(model)


def cuts(p):
    """The dimensions that a parameter is cut along and over how many ranks."""
    if not isinstance(p, DTensor):
        return []
    pairs = enumerate(p.placements)
    return [(at.dim, p.device_mesh.size(i)) for i, at in pairs if isinstance(at, Shard)]


def shares_bits(p, states, weights):
    """Whether docs/zero.md promises the bits of one process for a parameter."""
    form = STATE_FORMATS[states]
    for dim, ranks in cuts(p):
        rows, inner = p.shape[dim], math.prod(p.shape[dim + 1 :])
        most = -(-rows // ranks)
        starts = [rank * most * inner for rank in range(ranks) if rank * most < rows]
        stretch = ranks == 1 or math.prod(p.shape[:dim]) == 1
        if form.block > 1 and not (stretch and all(s % form.block == 0 for s in starts)):
            return False
        if (form.stochastic or WEIGHT_FORMATS[weights].stochastic) and not stretch:
            return False
    return True


def saved_as_codes(p, states):
    """Whether a checkpoint has the codes of a parameter's states rather than their fp32 values."""
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
    """A local gradient as a special tensor of the same values."""
    if kind == "pending":
        return functional.all_reduce(tensor, "sum", solo)
    if kind == "negative":
        return torch._neg_view(-tensor)
    if kind == "expanded" and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    if kind == "strided" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return tensor


def gradient(p, full, kind, solo):
    """A gradient for a parameter, plain or a DTensor, of a kind of GRADIENTS."""
    full = full.clone()
    if not isinstance(p, DTensor):
        return altered(full, kind, solo)
    over = p.device_mesh
    if kind == "partial":  # the first rank has all of it, the others add zeros
        mine = full if not any(over.get_coordinate()) else torch.zeros_like(full)
        return DTensor.from_local(mine, over, [Partial()] * over.ndim, run_check=False)
    placements = p.placements
    if kind in ("replicate", "other_dim"):
        placements = [Replicate()] * over.ndim
    if kind == "other_dim":
        placements[-1] = Shard(p.dim() - 1)
    mine = altered(local(distribute_tensor(full, over, placements, src_data_rank=None)), kind, solo)
    sizes = {"shape": full.shape, "stride": full.stride()}
    return DTensor.from_local(mine, over, placements, run_check=False, **sizes)


class Run:
    """A case on full tensors and, once build was called, on the ranks of a segment.

    Attributes:
        sides: the twin, the oracle if there is one, and the ranks' optimizer: each with its
            parameters and the optimizer that steps.
        exact: of each parameter, whether it has had the bits of the twin so far.
        paths: of each parameter, the sum of the root mean squares of the twin's updates.
    """

    def __init__(self, case, note):
        self.case, self.note = case, note
        self.settings = dict(case.settings)
        self.formats = {key: case.options[key] for key in ("states", "weights")}
        self.twin = list(Net(case).parameters())
        self.reference = case.optimizer(self.twin, self.formats, self.settings, sharded=False)
        doubles = [torch.nn.Parameter(p.detach().double()) for p in self.twin]
        self.oracle = case.oracle(doubles)
        self.sides = [(self.twin, self.reference)]
        self.sides += [(doubles, self.oracle)] if self.oracle else []
        self.model = None
        self.exact, self.paths = [True] * len(self.twin), [0.0] * len(self.twin)
        self.steps = 0

    def build(self, world, solo, saving):
        """Makes the model and the optimizer of the ranks.

        Args:
            solo: a process group of this rank alone.
            saving: one of all ranks, for checkpoints that are written while steps are taken.
        """
        self.world, self.solo, self.saving = world, solo, saving
        self.model = Net(self.case)
        shard(self.model, self.case, world)
        self.params = list(self.model.parameters())
        self.remake()

    def remake(self):
        """Makes the ranks' optimizer anew, as a run does that goes on from a checkpoint."""
        for p in self.params:
            p.grad = None
        outer = self.case.optimizer(self.params, self.formats, self.settings)
        self.optimizer, self.inner = outer, getattr(outer, "optim", outer)
        self.sides = [s for s in self.sides if s[0] is not self.params]
        self.sides.append((self.params, self.inner))
        self.owned = {p for group in self.inner.param_groups for p in group["params"]}
        self.skipped_before, self.judged = int(self.reference.skipped_steps), False

    def drop_oracle(self):
        """Goes on without the oracle, which does not know what comes."""
        self.sides = [side for side in self.sides if side[1] is not self.oracle]
        self.oracle = None

    def set_options(self, **options):
        """Options of the groups, on all sides."""
        for _, optimizer in self.sides:
            outer = self.optimizer if self.model and optimizer is self.inner else optimizer
            for group in outer.param_groups:
                group.update(options)

    def set_settings(self, **settings):
        """Attributes of the optimizers, on all sides."""
        self.settings.update(settings)
        for _, optimizer in self.sides:
            for name, value in settings.items():
                setattr(optimizer, name, value)

    def keep_exact(self, keeps):
        """Parameters of which keeps is false may differ from the twin from now on."""
        if self.model is not None:
            pairs = zip(self.exact, self.params, strict=True)
            self.exact = [known and keeps(p) for known, p in pairs]

    def fulls(self, rng, infinite=False, missing=False):
        """The full gradients of a step, None where there is none, and their kinds."""
        fulls, kinds = [], []
        for p in self.twin:
            kind = rng.choice(["own"] * 8 + allowed(GRADIENTS))
            generator = torch.Generator().manual_seed(rng.getrandbits(40))
            shape = (1, *p.shape[1:]) if kind == "expanded" else p.shape
            full = torch.randint(-127, 128, shape, generator=generator) * 2.0 ** -rng.randint(7, 15)
            full[torch.rand(shape, generator=generator) < 0.1] = 0
            full = full.to(p.dtype)
            fulls.append(full.expand(p.shape).contiguous())
            kinds.append(kind)
        if infinite:
            i = rng.randrange(len(fulls))
            kinds[i] = "own" if kinds[i] == "expanded" else kinds[i]
            fulls[i].view(-1)[rng.randrange(fulls[i].numel())] = rng.choice((math.inf, math.nan))
        if missing:
            some = rng.sample(range(len(fulls)), rng.randint(1, len(fulls)))
            fulls = [None if i in some else full for i, full in enumerate(fulls)]
        return fulls, kinds

    def step(self, fulls, kinds):
        """One step on all sides, compared."""
        before = [q.detach().clone() for q in self.twin]
        for params, _ in self.sides[: 2 if self.oracle else 1]:
            for q, full in zip(params, fulls, strict=True):
                q.grad = None if full is None else full.to(q.dtype, copy=True)
        self.reference.step()
        finite = all(full is None or full.isfinite().all() for full in fulls)
        if self.oracle and (finite or not self.settings["skip_nonfinite"]):
            if (limit := self.settings["max_grad_norm"]) is not None:
                norm_type = self.settings["norm_type"]
                torch.nn.utils.clip_grad_norm_(self.sides[1][0], limit, norm_type)
            self.oracle.step()
        self.steps += 1
        for i, (q, old) in enumerate(zip(self.twin, before, strict=True)):
            self.paths[i] += float((q.detach().double() - old.double()).square().mean().sqrt())
        if self.model is not None:
            self.keep_exact(lambda p: shares_bits(p, **self.formats))
            judges = self.settings["max_grad_norm"] is not None or self.settings["skip_nonfinite"]
            self.judged |= judges and any(full is not None for full in fulls)
            self.step_ranks(fulls, kinds)
            self.compare()
            self.compare_gradients(fulls)

    def step_ranks(self, fulls, kinds):
        """One step of the ranks alone."""
        for p, full, kind in zip(self.params, fulls, kinds, strict=True):
            p.grad = None if full is None else gradient(p, full, kind, self.solo)
        self.optimizer.step()

    def compare(self):
        """Weights, states, norm and count of skipped steps are those of one process."""
        for i, (p, q) in enumerate(zip(self.params, self.twin, strict=True)):
            what = f"parameter {i} of shape {tuple(q.shape)}"
            mine, theirs = local(p.detach()), part_of(q.detach(), p)
            if self.exact[i]:
                assert same_bits(mine, theirs), f"{what}: {differing(mine, theirs)}"
                if p in self.owned:
                    self.compare_states(what, p, q)
            elif mine.numel():
                gap = float((mine.double() - theirs.double()).square().mean().sqrt())
                # A weight may be rounded to its other neighbour at each step.
                rounding = torch.finfo(q.dtype).eps * float(q.detach().abs().max()) * self.steps
                limit = CUT_BLOCKS * self.paths[i] + rounding
                assert gap <= limit, f"{what}: {gap:.2e} from one process, limit {limit:.2e}"
            if self.oracle:
                lr, size = self.case.options["lr"], float(q.detach().abs().max())
                near = {"rtol": 0, "atol": self.steps * (2e-5 * lr + 2**-23 * size)}
                exact = part_of(self.sides[1][0][i].detach(), p)
                where = f"{what} against torch.optim: "
                torch.testing.assert_close(mine.double(), exact, **near, msg=where.__add__)
        ours, theirs = (o.grad_norm if self.judged else None for o in (self.inner, self.reference))
        same = ours is theirs or (None not in (ours, theirs) and same_bits(ours, theirs))
        assert same, f"grad_norm is {ours}, in one process {theirs}"
        skips = int(self.reference.skipped_steps) - self.skipped_before
        ours = int(self.inner.skipped_steps)
        assert ours == skips, f"skipped_steps is {ours}, in one process {skips}"

    def compare_states(self, what, p, q):
        """The states of a parameter are those of one process, bit for bit."""
        ours, theirs = self.inner.state.get(p, {}), self.reference.state.get(q, {})
        assert ours.keys() == theirs.keys(), f"{what} has {[*ours]}, in one process {[*theirs]}"
        for key, value in ours.items():
            # Codes and scales of a shard's own blocks are plain tensors with no counterpart.
            if isinstance(value, DTensor) or not isinstance(p, DTensor) or key == "step":
                mine, other = local(value), part_of(theirs[key], value)
                other = other.reshape(mine.shape)
                assert same_bits(mine, other), f"{key} of {what}: {differing(mine, other)}"

    def compare_gradients(self, fulls):
        """Gradients are only read, or zero where zero_grads says so."""
        for i, (p, full) in enumerate(zip(self.params, fulls, strict=True)):
            if full is None or p not in self.owned:
                continue
            what = f"gradient {i} of shape {tuple(full.shape)}"
            if self.settings["zero_grads"]:
                assert not local(p.grad).any(), f"{what} is not zero after a step with zero_grads"
            elif not isinstance(p.grad, DTensor) or Partial() not in p.grad.placements:
                same = torch.equal(local(p.grad).nan_to_num(), part_of(full, p.grad).nan_to_num())
                assert same, f"{what} was changed"


def differing(mine, other):
    """Where two tensors differ, for a message."""
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return (
            f"{mine.dtype} {tuple(mine.shape)}, in one process {other.dtype} {tuple(other.shape)}"
        )
    at = (mine != other).flatten().nonzero().flatten()
    values = [(int(i), mine.flatten()[i].item(), other.flatten()[i].item()) for i in at[:3]]
    return f"{len(at)} of {mine.numel()} elements differ; index, value, in one process: {values}"


# --- operations: each is a function of the run and of random numbers of its own ---


def step(run, rng):
    fulls, kinds = run.fulls(rng)
    run.note(f"a step, gradients {kinds}")
    run.step(fulls, kinds)


def missing(run, rng):
    fulls, kinds = run.fulls(rng, missing=True)
    none = [i for i, full in enumerate(fulls) if full is None]
    run.note(f"a step without the gradients {none}, the others {kinds}")
    run.step(fulls, kinds)


def skip(run, rng):
    fulls, kinds = run.fulls(rng, infinite=True)
    run.set_settings(skip_nonfinite=True)
    at = [
        (i, int((~f.isfinite()).flatten().nonzero()[0]))
        for i, f in enumerate(fulls)
        if not f.isfinite().all()
    ]
    run.note(f"skip_nonfinite=True, a step not finite at (gradient, element) {at}, {kinds}")
    run.step(fulls, kinds)


def options(run, rng):
    lr = run.case.options["lr"]
    name, values = rng.choice(
        [
            ("lr", (lr, lr / 4)),
            ("weight_decay", (0.0, 0.2)),
            ("max_grad_norm", (None, 0.25, 1e3)),
            ("norm_type", (2.0, math.inf)),
            ("skip_nonfinite", (False, True)),
            ("zero_grads", (False, True)),
        ]
    )
    value = rng.choice(values)
    run.note(f"{name} = {value}")
    (run.set_settings if name in run.settings else run.set_options)(**{name: value})


def formats(run, rng):
    known = [name for name in allowed(STATE_FORMATS) if served(run.case.options, name)]
    states = rng.choice(known)
    run.note(f"param_groups[...]['states'] = {states!r}")
    run.formats["states"] = states
    run.set_options(states=states)
    if states != "fp32":
        run.drop_oracle()


def replace(run, rng):
    """Puts other tensors into optimizer.state."""
    i, inplace = rng.randrange(len(run.twin)), rng.random() < 0.3
    # Codes of blocks cannot be multiplied: the new tensor is a copy.
    factor = 0.5 if STATE_FORMATS[run.formats["states"]].block == 1 else None
    names = [key for _, key, _ in run.reference.rule.slots]
    run.note(f"states of parameter {i} {'in place' if inplace else 'replaced'}, times {factor}")
    for params, optimizer in run.sides:
        state = optimizer.state.get(params[i], {})
        for key in [name for name in names if state.get(name) is not None]:
            if factor and inplace:
                state[key].mul_(factor)
            else:
                state[key] = state[key] * factor if factor else state[key].clone()


def forget(run, rng):
    """Removes the states of a parameter, which start again in the step that follows."""
    i = rng.randrange(len(run.twin))
    run.note(f"del optimizer.state[parameter {i}]")
    if run.case.kind is onepass.Adagrad:
        run.drop_oracle()  # torch makes Adagrad's states only in the constructor
    for params, optimizer in run.sides:
        optimizer.state.pop(params[i], None)
    step(run, rng)


def reload(run, rng):
    """Saves, takes a step that is lost, and goes on from what was saved with a new optimizer."""
    ways = ("consolidate",) if run.case.layout == "zero" else (*IN_MEMORY, *WITH_WEIGHTS)
    how, lost = rng.choice(allowed(ways)), rng.random() < 0.5
    fulls, kinds = run.fulls(rng)
    run.note(f"save by {how}, {'a step that is lost, ' if lost else ''}load into a new optimizer")
    if run.model is None:
        return
    path = run.path / f"reload{run.steps}-{rng.getrandbits(32)}"
    weights = [local(p.detach()).clone() for p in run.params]
    saved = save(run, how, path)
    if lost:
        run.step_ranks(fulls, kinds)
    saved = saved.result() or saved if how == "async" else saved
    with torch.no_grad():
        for p, value in zip(run.params, weights, strict=True):
            local(p).copy_(value if how not in WITH_WEIGHTS else torch.zeros_like(value))
    load(run, how, path, saved)


def save(run, how, path):
    """Saves the states, with the weights to a directory; returns what load needs."""
    if how == "consolidate":
        run.optimizer.consolidate_state_dict(0)
        found = [run.optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]
    if how in WITH_WEIGHTS:
        state = model_and_optimizer(run, how)
        write = dcp.async_save if how == "async" else dcp.save
        return write(state, checkpoint_id=str(path), process_group=run.saving)
    if how == "full":
        return copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=FULL))
    state = run.optimizer.state_dict()
    if how == "torch_save":
        torch.save(state, buffer := io.BytesIO())
        return buffer
    if how == "direct":
        return dcp.save({"optimizer": state}, checkpoint_id=str(path))
    return pickle.dumps(state) if how == "pickle" else copy.deepcopy(state)


def model_and_optimizer(run, how):
    """What get_state_dict finds, flattened or not."""
    flat = StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat")
    found = get_state_dict(run.model, run.optimizer, options=flat)
    return dict(zip(("model", "optimizer"), found, strict=True))


def load(run, how, path, saved):
    """Makes a new optimizer and loads what save has saved into it."""
    template = run.optimizer.state_dict() if how == "direct" else None
    run.remake()
    if how in WITH_WEIGHTS:
        state = model_and_optimizer(run, how)
        dcp.load(state, checkpoint_id=str(path))
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat"),
        )
    elif how == "full":
        set_optimizer_state_dict(run.model, run.optimizer, saved, options=SPREAD)
    else:
        if how == "torch_save":
            saved.seek(0)
            saved = torch.load(saved, weights_only=False)
        elif how == "pickle":
            saved = pickle.loads(saved)
        elif how == "direct":
            dcp.load(state := {"optimizer": template}, checkpoint_id=str(path))
            saved = state["optimizer"]
        run.optimizer.load_state_dict(saved)
    run.keep_exact(lambda p: saved_as_codes(p, run.formats["states"]))


OPERATIONS = {
    "step": (step, 6),
    "missing": (missing, 2),
    "skip": (skip, 2),
    "options": (options, 2),
    "formats": (formats, 1),
    "replace": (replace, 1),
    "forget": (forget, 1),
    "reload": (reload, 4),
}
"""Name: the function and how often it is chosen."""


def move_out(run, how):
    """Saves a run for another number of ranks."""
    how = "consolidate" if run.case.layout == "zero" else how
    run.note(f"save by {how} for another number of ranks")
    saved = save(run, how, run.path / "moved")
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in run.params]
    if dist.get_rank() == 0:
        weights = [w.detach() for w in weights]
        torch.save(
            (saved if how in ("full", "consolidate") else None, weights, run.exact),
            run.path / "moved.pt",
        )
    dist.barrier()


def move_in(run, how):
    """Goes on from what another number of ranks has saved."""
    how = "consolidate" if run.case.layout == "zero" else how
    run.note(f"{run.world} ranks load what was saved by {how}")
    saved, weights, run.exact = torch.load(run.path / "moved.pt", weights_only=False)
    with torch.no_grad():
        for p, value in zip(run.params, weights, strict=True):
            if how not in WITH_WEIGHTS:
                local(p).copy_(part_of(value, p))
    load(run, how, run.path / "moved", saved)


def play(seed, segment, directory, note, *groups):
    """Runs a segment of a case on all ranks of this process group; raises where it fails."""
    case = Case(seed)
    note(str(case))
    run = Run(case, lambda text: None)
    run.path = directory
    for number, plan in enumerate(case.plan[: segment + 1]):
        if number == segment:
            run.note = note
            run.build(dist.get_world_size(), *groups)
            if segment:
                move_in(run, case.moves[segment - 1])
        for index, name in enumerate(plan):
            OPERATIONS[name][0](run, random.Random(f"{seed}/{number}/{index}"))
    if segment + 1 < len(case.plan):
        move_out(run, case.moves[segment])
