"""The operations of the random test, one function for each."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any

import pytest
import torch

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules.group_options import DEFAULTS
from onepass.rules.group_options import option as option_of

from ..cases import served
from .odd_tensors import AMBIENT, FAULTS, GRADIENTS, MAY_REFUSE
from .random_world import (
    REFUSALS,
    SETTINGS,
    Copy,
    Grads,
    World,
    assert_equal,
    clones,
    draw_group,
    make_group,
    same_bits,
)

WITHOUT = os.environ.get("ONEPASS_RANDOM_WITHOUT", "").split(",")
"""Patterns of names of operations, gradients, settings and faults to leave out."""

Random = random.Random
Operation = Callable[[World, Random], None]
OPERATIONS: dict[str, Operation] = {}
WEIGHTS: dict[str, int] = {}


def allowed(names: Iterable[str]) -> list[str]:
    """The names that no pattern of WITHOUT matches."""
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in WITHOUT)]


def operation(weight: int = 1) -> Callable[[Operation], Operation]:
    """Decorator that adds an operation to the table; weight is its relative frequency."""

    def enter(function: Operation) -> Operation:
        if allowed([function.__name__]):
            OPERATIONS[function.__name__], WEIGHTS[function.__name__] = function, weight
        return function

    return enter


# --- steps -----------------------------------------------------------------------------------


@operation(8)
def step(world: World, rng: Random) -> None:
    """A step with gradients of any representation, in any setting."""
    grads, built = world.draw_gradients(rng), {}
    kind = rng.choice([None, *allowed(GRADIENTS)])
    ambient = rng.choice(["", "", *allowed(AMBIENT)])
    for i, grad in enumerate(grads):
        if kind and grad is not None and grad.numel() and rng.random() < 0.7:
            value, built[i] = GRADIENTS[kind]
            grads[i] = value(grad)
    missing = [i for i, grad in enumerate(grads) if grad is None]
    world.tell(f"step: {kind} gradients {list(built)}, none {missing}, setting {ambient!r}")

    def build(plain: Grads) -> Grads:
        return [built[i](grad) if i in built else grad for i, grad in enumerate(plain)]

    world.step(grads, build, ambient, may_refuse=kind in MAY_REFUSE)


@operation()
def nonfinite_step(world: World, rng: Random) -> None:
    grads, value = world.draw_gradients(rng), rng.choice((float("inf"), float("-inf")))
    at = [i for i, grad in enumerate(grads) if grad is not None and grad.numel()]
    if not at:
        return
    i = rng.choice(at)
    grads[i].reshape(-1)[-1] = value
    world.tell(f"step: {value} in gradient {i}, skip_nonfinite")
    before = world.plain.optimizer.skip_nonfinite
    for one in world.copies:
        one.optimizer.skip_nonfinite = True
    world.step(grads)
    for one in world.copies:
        one.optimizer.skip_nonfinite = before


@operation()
def shared_gradient_step(world: World, rng: Random) -> None:
    """A step in which one tensor, or overlapping views of it, is the gradient of two parameters."""
    grads, params = world.draw_gradients(rng), world.plain.params
    flat = [i for i, p in enumerate(params) if p.dim() == 1 and p.numel()]
    pairs = [(i, j) for i in flat for j in flat if i < j and params[i].dtype == params[j].dtype]
    if not pairs:
        return
    i, j = rng.choice(pairs)
    sizes, offset = (params[i].numel(), params[j].numel()), rng.choice((0, 0, 1, 2))
    base = torch.randn(
        max(sizes) + offset, generator=torch.Generator().manual_seed(rng.getrandbits(30))
    )
    base = base.to(params[i].dtype)
    world.tell(f"step: gradients {i} and {j} are views of one tensor, {offset} apart")

    def views(plain: Grads) -> Grads:
        whole = base.clone()
        plain[i], plain[j] = whole[: sizes[0]], whole[offset : offset + sizes[1]]
        if plain[i].shape == plain[j].shape and not offset:
            plain[j] = plain[i]
        return plain

    world.step(clones(views(grads)), views)


@operation(6)
def refused_step(world: World, rng: Random) -> None:
    """A step that must raise and change nothing, followed by a valid step."""
    grads = world.draw_gradients(rng)
    seed, name = rng.getrandbits(30), rng.choice(allowed(FAULTS))
    at = [i for i, grad in enumerate(grads) if grad is not None]
    if not at:
        return
    # Mostly one of the last parameters, so that the error occurs after much work is done.
    i = rng.choice((*at, at[-1], at[-1]))
    world.tell(f"step: {name} at parameter {i} must raise; then a step")
    for one in world.others:
        one.set_gradients(clones(grads))
        before = one.contents()
        undo = FAULTS[name](one.optimizer, one.params[i], one.groups[i], Random(seed))
        if undo is None:
            continue
        try:
            one.optimizer.step()
        except REFUSALS:
            pass
        else:
            raise AssertionError(f"{one.name}: a step with {name} at parameter {i} did not raise")
        finally:
            undo()
        world.check_unchanged(one, before, grads)
    world.step(grads)


# --- operations that change results, applied to every copy ---

# Functions make the values, because copies must not share a tensor.
OPTIONS: dict[str, list[Callable[[], Any]]] = {
    "lr": [lambda: 0.0, lambda: 0.003, lambda: 1, lambda: torch.tensor(0.02)],
    "weight_decay": [lambda: 0.0, lambda: 0.1],
    "betas": [lambda: (0.9, 0.99), lambda: (0.0, 0.5), lambda: [0.5, 0.0]],
    "alpha": [lambda: 0.9, lambda: 0.5],
    "eps": [lambda: 1e-8, lambda: 1e-3],
    "lr_decay": [lambda: 0.0, lambda: 0.1],
    "maximize": [lambda: False, lambda: True],
    "decoupled_weight_decay": [lambda: False, lambda: True],
    "seed": [lambda: 0, lambda: (1 << 63) - 1],
}


@operation(2)
def option(world: World, rng: Random) -> None:
    at = rng.randrange(len(world.plain.optimizer.param_groups))
    group = {**DEFAULTS, **world.plain.optimizer.param_groups[at]}
    kept = "decoupled_weight_decay" if group["cautious_weight_decay"] else ""
    key = rng.choice([k for k in OPTIONS if k in group and k != kept])
    make = rng.choice(OPTIONS[key])
    world.tell(f"param_groups[{at}][{key!r}] = {make()!r}")
    for one in world.copies:
        value = make()
        if key == "betas" and len(one.optimizer.defaults["betas"]) == 3:
            value = (*value, 0.9999)  # AdEMAMix has a third beta
        if key == "betas" and world.case.name == "schedulefree":
            value = (0.9, value[1])  # the first beta must not be 0
        one.optimizer.param_groups[at][key] = value


@operation()
def shared_lr(world: World, rng: Random) -> None:
    """Sets the same learning-rate tensor in all groups; lr_in_place may change it later."""
    world.tell("one lr tensor in all groups")
    for one in world.copies:
        lr = torch.tensor(0.05)
        for group in one.optimizer.param_groups:
            group["lr"] = lr


@operation()
def lr_in_place(world: World, rng: Random) -> None:
    if not isinstance(world.plain.optimizer.param_groups[0]["lr"], torch.Tensor):
        return
    world.tell("param_groups[0]['lr'].mul_(0.5)")
    for one in world.copies:
        one.optimizer.param_groups[0]["lr"].mul_(0.5)


@operation()
def setting(world: World, rng: Random) -> None:
    name = rng.choice(list(SETTINGS))
    value = rng.choice(SETTINGS[name])
    world.tell(f"optimizer.{name} = {value!r}")
    for one in world.copies:
        setattr(one.optimizer, name, value)


@operation(2)
def flags(world: World, rng: Random) -> None:
    """Switches options of the algorithm, such as momentum or amsgrad, on or off."""
    at = rng.randrange(len(world.plain.optimizer.param_groups))
    group = world.plain.optimizer.param_groups[at]
    keys = {key for row in world.case.options for key in row}
    decoupled = option_of(group, "decoupled_weight_decay")
    rows = [
        row
        for row in world.case.options
        if served(row, option_of(group, "states"))
        and (decoupled or not row.get("cautious_weight_decay"))
    ]
    chosen = {**dict.fromkeys(keys, 0), **rng.choice(rows)}
    chosen = {
        k: bool(v) if isinstance(group.get(k, DEFAULTS.get(k)), bool) else v
        for k, v in chosen.items()
    }
    world.tell(f"param_groups[{at}].update({chosen})")
    for one in world.copies:
        one.optimizer.param_groups[at].update(chosen)


@operation()
def formats(world: World, rng: Random) -> None:
    """Sets other formats and takes a step in which every parameter is converted."""
    at = rng.randrange(len(world.plain.optimizer.param_groups))
    group = world.plain.optimizer.param_groups[at]
    states = rng.choice([name for name in STATE_FORMATS if served(group, name)])
    dtypes = {p.dtype for p in group["params"]}
    weights = rng.choice([n for n, form in WEIGHT_FORMATS.items() if dtypes <= set(form.codes)])
    chosen = {"states": states, "weights": weights, "ema_decay": rng.choice((None, 0.9))}
    world.tell(f"param_groups[{at}].update({chosen}); a step")
    for one in world.copies:
        one.optimizer.param_groups[at].update(chosen)
    grads = world.draw_gradients(rng)
    pairs = zip(world.plain.params, grads, strict=True)
    world.step([torch.ones_like(p) if grad is None else grad for p, grad in pairs])


@operation()
def new_group(world: World, rng: Random) -> None:
    drawn = draw_group(world.case, rng)
    if len(world.plain.params) > 60:
        return
    world.tell(f"add_param_group: {drawn}")
    for one in world.copies:
        one.optimizer.add_param_group(make_group(drawn))
        one.serve_new()


@operation()
def clear_states(world: World, rng: Random) -> None:
    world.tell("optimizer.state.clear()")
    world.begun.clear()
    for one in world.copies:
        one.optimizer.state.clear()


@operation()
def forget_parameter(world: World, rng: Random) -> None:
    i = rng.randrange(len(world.plain.params))
    world.tell(f"optimizer.state.pop(parameter {i}, None)")
    world.begun.discard(i)
    for one in world.copies:
        one.optimizer.state.pop(one.params[i], None)


@operation()
def change_state(world: World, rng: Random) -> None:
    """Replaces states by new tensors with other values, and sets the step counter to 50."""
    i = rng.randrange(len(world.plain.params))
    world.tell(f"halves states of parameter {i}, and lets it have taken 50 steps")
    for one in world.copies:
        state = one.optimizer.state.get(one.params[i], {})
        for key, value in list(state.items()):
            if key == "step":
                state[key] = torch.tensor(50.0)
            elif isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                state[key] = value * 0.5


@operation()
def change_weights(world: World, rng: Random) -> None:
    in_place = rng.random() < 0.5
    world.tell(f"halves the weights, {'in place' if in_place else 'in new memory'}")
    for one in world.copies:
        for p in one.params:
            if in_place:
                p.data.mul_(0.5)
                onepass.mark_changed(p)  # a write through .data does not move the version counter
            else:
                p.data = p.detach() * 0.5


@operation(2)
def send_patch(world: World, rng: Random) -> None:
    world.tell("send the changed weights")
    for one in world.others:
        one.send_patch()


# --- operations that must not change results, applied to all copies except the plain one ---


def _loaded(one: Copy, saved: dict[str, Any], anew: bool) -> onepass.Optimizer:
    optimizer = one.optimizer
    if anew:
        names = ("backend", "norm_type", *SETTINGS)
        groups = [dict(group) for group in optimizer.param_groups]
        settings = {name: getattr(optimizer, name) for name in names}
        settings["track_changes"] = optimizer.changes is not None
        optimizer = type(optimizer)(groups, **settings)
    optimizer.load_state_dict(saved)
    return optimizer


def _saved(one: Copy) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(one.optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


def _swap_parameters(one: Copy) -> None:
    for p in one.params:
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


def _replace_states(one: Copy) -> None:
    for state in one.optimizer.state.values():
        for key, value in list(state.items()):
            state[key] = value.clone() if isinstance(value, torch.Tensor) else value


def _replace_state_dictionaries(one: Copy) -> None:
    for p, state in list(one.optimizer.state.items()):
        one.optimizer.state[p] = dict(state)


def _move_weights(one: Copy) -> None:
    for p in one.params:
        p.data = p.detach().clone()


def _averaged(one: Copy) -> None:
    """Checks that averaged_weights() sets the averages and restores the weights bit for bit."""
    before, states = one.contents(), one.optimizer.state
    if all(option_of(group, "ema_decay") is None for group in one.optimizer.param_groups):
        return
    with one.optimizer.averaged_weights():
        for p, group in zip(one.params, one.groups, strict=True):
            average = states.get(p, {}).get("ema")
            if average is not None and option_of(group, "ema_decay") is not None:
                assert same_bits(p.detach(), average.to(p.dtype)), "the average"
        with pytest.raises(RuntimeError):
            one.optimizer.step()
    assert_equal(one.contents(), before, f"{one.name} after averaged_weights()")


NEUTRAL: dict[str, Callable[[Copy], Any]] = {
    "load_state_dict": lambda one: one.replace(_loaded(one, one.optimizer.state_dict(), False)),
    "load_into_new": lambda one: one.replace(_loaded(one, one.optimizer.state_dict(), True)),
    "save_and_load": lambda one: one.replace(_loaded(one, _saved(one), True)),
    "deepcopy": lambda one: one.replace(copy.deepcopy(one.optimizer)),
    "pickle": lambda one: one.replace(pickle.loads(pickle.dumps(one.optimizer))),
    "swap_parameters": _swap_parameters,
    "replace_states": _replace_states,
    "replace_state_dictionaries": _replace_state_dictionaries,
    "move_weights": _move_weights,
    "averaged_weights": _averaged,
}


LOADING = {"load_state_dict", "load_into_new", "save_and_load"}
"""Operations through a state dict, which may omit the step counters of SGD."""


@operation(8)
def neutral(world: World, rng: Random) -> None:
    name = rng.choice(allowed(NEUTRAL))
    world.tell(name)
    if name in LOADING and not world.plain.optimizer.rule.saves_step:
        world.plain.skipped = int(world.plain.optimizer.skipped_steps)
        NEUTRAL["load_state_dict"](world.plain)
    for one in world.others:
        one.skipped = int(one.optimizer.skipped_steps)
        NEUTRAL[name](one)
