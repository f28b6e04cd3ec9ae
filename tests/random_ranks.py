"""Runs a random case on several ranks and in one process; see test_random_ranks.py.

The seed determines a case: a model, an optimizer and segments of operations. Each segment runs on
its own number of ranks and loads what the segment before it saved. Every rank also runs the case on
full tensors with the same optimizer class (the twin) and, for fp32 training, with torch.optim in
float64 (the oracle).

Gradients are integers below 128 times a power of two. The sums of their squares are exact in
float64 in any order, so the global norm and every clipped step must have the same bits as in one
process.
"""

from __future__ import annotations

import math
import random
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial

import onepass
from onepass.formats import STATE_FORMATS

from .cases import same_bits, served
from .random_ranks_case import (
    GRADIENTS,
    SETTINGS,
    WITH_WEIGHTS,
    WITHOUT,
    Case,
    allowed,
    cut_blocks,
    differing,
    gradient,
    has_bits_of_one_process,
    local,
    part_of,
    shard,
)
from .random_ranks_saving import IN_MEMORY, WAYS, load, save


class Run:
    """A case on full tensors and, after build, on the ranks of this segment.

    Attributes:
        sides: (parameters, optimizer) of the twin, of the oracle if there is one, and of the ranks.
        exact: for each parameter, whether it must have the bits of the twin.
        paths: for each parameter, the sum of the root mean squares of the twin's updates.
    """

    def __init__(self, case):
        self.case, self.note, self.model, self.steps = case, lambda text: None, None, 0
        self.formats, self.settings = dict(case.formats), dict(case.settings)
        self.held_in = self.formats["states"]  # state format after the last step
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
        """Builds the sharded model.

        Args:
            solo: a process group with this rank only.
            saving: a process group of all ranks, for saving checkpoints.
        """
        self.solo, self.saving, self.model = solo, saving, self.case.model()
        shard(self.model, self.case, dist.get_world_size())
        self.params = list(self.model.parameters())
        self.make_optimizer()

    def make_optimizer(self):
        """Creates the optimizer of the ranks, also to load a checkpoint into."""
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
        """Continues without the oracle, which does not support the next operation."""
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
        """Parameters for which keeps(p) is false may differ from the twin from now on."""
        self.exact = [same and keeps(p) for same, p in zip(self.exact, self.params, strict=True)]

    def step(self, fulls, kinds):
        """Takes one step on all sides with the same full gradients, and compares the results."""
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
        self.held_in = self.formats["states"]
        for i, (q, old) in enumerate(zip(self.twin, before, strict=True)):
            self.paths[i] += float((q.detach().double() - old).square().mean().sqrt())
        if self.model is not None:
            self.lose_bits(lambda p: has_bits_of_one_process(p, **self.formats))
            judges = settings["max_grad_norm"] is not None or settings["skip_nonfinite"]
            self.judged |= judges
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
                # Each step may round a weight to a neighbouring value.
                part = cut_blocks(self.case.kind, mine.numel())
                limit = part * self.paths[i] + self.steps * torch.finfo(q.dtype).eps * size
                assert gap <= limit, f"{what}: {gap:.2e} from the twin, limit {limit:.2e}"
            if self.oracle:  # each step may add a few eps of the update and of the weight
                atol = self.steps * (2e-5 * self.case.options["lr"] + 2**-23 * size)
                theirs = part_of(self.sides[1][0][i].detach(), p)
                gap = float((mine.double() - theirs).abs().max()) if mine.numel() else 0.0
                assert gap <= atol, f"{what}: {gap:.2e} from torch.optim, limit {atol:.2e}"

    def compare_states(self, what, ours, theirs):
        # ZeroRedundancyOptimizer loads states as they were saved: until the next step they may have
        # a second step counter, or none if the rule saves none.
        keys = ours.keys() - {"codes_step"}
        lacking = set() if self.reference.rule.saves_step else {"step"} - keys
        assert keys == theirs.keys() - lacking, f"{what} has {[*ours]}, the twin {[*theirs]}"
        for key, value in ((key, ours[key]) for key in sorted(keys)):
            # Plain tensors beside DTensors are codes and scales of blocks of the shard.
            if isinstance(value, DTensor) or key == "step" or self.case.layout == "zero":
                mine = local(value)
                other = part_of(theirs[key], value)
                if other.dtype == torch.int16 and mine.dtype == torch.uint8:
                    other = other.unsqueeze(-1).view(torch.uint8)  # the byte form of a loaded state
                other = other.reshape(mine.shape)
                assert same_bits(mine, other), f"{key} of {what}: {differing(mine, other)}"

    def compare_gradients(self, fulls):
        """Gradients are unchanged after a step, or zero if zero_grads is set."""
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


# --- operations: functions of the run and of a random generator that is equal on all ranks ---


def gradients(run, rng, infinite=False, missing=False):
    """The full gradients, with None for missing ones, and their kinds (of GRADIENTS)."""
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
    """Changes the state format. A checkpoint before the next step still has the old format."""
    known = [name for name in allowed(STATE_FORMATS) if served(run.case.options, name)]
    run.formats["states"] = states = rng.choice(known)
    run.note(f"states = {states!r}")
    run.set_options(states=states)
    if states != "fp32":
        run.drop_oracle()
    if rng.random() < 0.5 and allowed(IN_MEMORY):
        reload(run, rng, IN_MEMORY)
    step(run, rng)  # dcp cannot load a checkpoint into another format


def replace(run, rng):
    """Replaces tensors in optimizer.state, or changes their values in place."""
    i, inplace = rng.randrange(len(run.twin)), rng.random() < 0.3
    # Codes cannot be multiplied, so they are replaced by a copy.
    factor = 0.5 if STATE_FORMATS[run.formats["states"]].block == 1 else None
    run.note(f"states of parameter {i}, {'in place' if inplace else 'replaced'}, times {factor}")
    for params, optimizer in run.sides:
        state = optimizer.state.get(params[i], {})
        for key in [key for key in run.reference.rule.keys if key in state]:
            if inplace and factor:
                state[key].mul_(factor)
            elif state[key] is not None:
                state[key] = state[key] * factor if factor else state[key].clone()


def forget(run, rng):
    """Deletes the states of a parameter, which then start again."""
    i = rng.randrange(len(run.twin))
    run.note(f"del optimizer.state[parameter {i}]")
    if run.case.kind is onepass.Adagrad:
        run.drop_oracle()  # torch creates the states of Adagrad in the constructor only
    for params, optimizer in run.sides:
        optimizer.state.pop(params[i], None)
    step(run, rng)  # torch refuses to save an optimizer if states of a parameter are missing


def take_first_step(run, rng):
    """Takes a step if SGD has skipped all steps so far.

    SGD saves no momentum buffer until the first step, and torch refuses to save an optimizer if
    states of a parameter are missing.
    """
    counts = [state.get("step") for state in run.reference.state.values()]
    if not run.reference.rule.saves_step and 0 in counts:
        step(run, rng)


def count_anew(run):
    """Reloads the twin as the ranks are reloaded: step counters that are not saved restart."""
    if not run.reference.rule.saves_step:
        run.reference.load_state_dict(run.reference.state_dict())


def way(run, how):
    """The way `how` to save, or another way if this run does not support it."""
    if run.case.layout == "zero":
        return "consolidate"
    if how == "exchange" and (run.oracle is None or run.case.extras["ema_decay"] is not None):
        return "dcp"
    states = [v for state in run.reference.state.values() for v in state.values()]
    # torch cannot load a full state dict without a tensor of at least one dimension.
    return how if how != "full" or any(v.dim() for v in states if v is not None) else "dcp"


def reload(run, rng, ways=None):
    """Saves, sometimes takes a step whose result is lost, and loads into a new optimizer."""
    take_first_step(run, rng)
    how, lost = way(run, rng.choice(allowed(ways or WAYS))), rng.random() < 0.5
    fulls, kinds = gradients(run, rng)
    run.note(f"save by {how}, {f'lose a step with {kinds}, ' if lost else ''}load anew")
    number = rng.getrandbits(32)  # drawn before the return so that later draws are the same
    count_anew(run)
    if run.model is None:
        return
    path = str(run.path / f"{run.steps}-{number}")
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


OPERATIONS = {  # name: (function, weight of the random choice)
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
    """Saves a run for a segment on another number of ranks."""
    run.note(f"save by {how} for another number of ranks")
    saved = save(run, how, str(run.path / "moved"))
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in run.params]
    if dist.get_rank() == 0:
        saved = None if how in WITH_WEIGHTS else saved
        torch.save((saved, [w.detach() for w in weights], run.exact), run.path / "moved.pt")


def enter(run, how):
    """Loads what a segment on another number of ranks saved."""
    run.note(f"load on {dist.get_world_size()} ranks what was saved by {how}")
    saved, weights, run.exact = torch.load(run.path / "moved.pt", weights_only=False)
    with torch.no_grad():
        for p, value in zip(run.params, weights, strict=True):
            local(p).copy_(part_of(value, p) * (how not in WITH_WEIGHTS))
    load(run, how, str(run.path / "moved"), saved)


def worlds_of(seed):
    """The number of ranks of each segment of a case."""
    return Case(seed, OPERATIONS).worlds


def play(seed, segment, path, note, *groups):
    """Runs a segment of a case on all ranks; raises if the result differs from one process."""
    case = Case(seed, OPERATIONS)
    run = Run(case)
    run.path = path
    for number, plan in enumerate(case.plan[: segment + 1]):
        if number:
            count_anew(run)
        if number == segment:
            run.note = note
            note(f"{dist.get_world_size()} ranks: {case}")
            run.build(*groups)
            if segment:
                enter(run, way(run, case.moves[segment - 1]))
        for index, name in enumerate(plan):
            OPERATIONS[name][0](run, random.Random(f"{seed}/{number}/{index}"))
        if number + 1 < len(case.plan):
            take_first_step(run, random.Random(f"{seed}/{number}"))
    if segment + 1 < len(case.plan):
        leave(run, way(run, case.moves[segment]))
