"""Parameters, groups, steps and hooks: onepass optimizers behave like those of torch.optim."""

from __future__ import annotations

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .torch_scenarios import Scenarios, errors_of, param, rounded, steps

scenario = Scenarios()


# --- forms of params -------------------------------------------------------------------------


@scenario
def forms_of_params(make):
    layer = torch.nn.Linear(2, 2)
    given = [
        [param(), param()],
        (p for p in (param(), param())),
        {param(), param()},
        layer.named_parameters(),
        [{"params": param()}],
        [{"params": (p for p in (param(), param()))}],
        ({"params": [p], "lr": 0.1} for p in (param(), param())),
        [{"params": []}, {"params": [param()]}],
        [{"params": layer.named_parameters(), "lr": 0.5}],
        [("a", param()), ("a", param())],
        [torch.ones(2)],
    ]
    groups = [make(params).param_groups for params in given]
    return [[(len(g["params"]), g["lr"], g.get("param_names")) for g in gs] for gs in groups]


@scenario
def wrong_params(make):
    given = [
        [],
        iter(()),
        param(),
        [1, 2],
        3,
        torch.nn.Linear(2, 2),
        [param() * 2],
        {"params": [param()]},
        [{"lr": 0.1}],
        [{"params": {param()}}],
        [("a", param()), param()],
    ]
    return errors_of([lambda params=params: make(params) for params in given])


@scenario
def wrong_groups(make):
    taken = param()
    optimizer = make([taken])
    given = [
        [param()],
        param(),
        3,
        {"params": {param()}},
        {"params": [3]},
        {"params": 3},
        {"params": [param() * 1]},
        {"lr": 1.0},
        {"params": [("a", param())]},
        {"params": [taken]},
    ]
    errors = errors_of([lambda group=group: optimizer.add_param_group(group) for group in given])
    return errors, len(optimizer.param_groups)


@scenario
def added_groups(make):
    optimizer = make([param()], lr=0.1)
    optimizer.add_param_group({"params": param(1), "lr": 0.5})
    optimizer.add_param_group({"params": [], "weight_decay": 0.1})
    optimizer.add_param_group({"params": [param(2)], "own": "value"})
    weights = rounded(steps(optimizer))
    return weights, [(g["lr"], g["weight_decay"], g.get("own")) for g in optimizer.param_groups]


@scenario
def a_parameter_twice_in_a_group_warns(make):
    p = param()
    return len(make([p, p]).param_groups[0]["params"])


@scenario
def options_of_a_group_override_the_defaults(make):
    groups = [{"params": [param()], "lr": 0.5, "weight_decay": 0.2}, {"params": [param()]}]
    optimizer = make(groups, lr=0.1, weight_decay=0.05)
    return rounded(steps(optimizer, 3)), sorted(groups[1]) == sorted(optimizer.param_groups[1])


@scenario
def options_may_change_between_steps(make):
    optimizer = make([param()], lr=0.1)
    steps(optimizer)
    optimizer.param_groups[0].update(lr=0.01, weight_decay=0.3)
    return rounded(steps(optimizer))


@scenario
def lr_as_a_tensor(make):
    optimizers = [make([param()], lr=torch.tensor(value)) for value in (0.1, [0.1])]
    weights = [rounded(steps(optimizer)) for optimizer in optimizers]
    optimizers[0].param_groups[0]["lr"].mul_(0.5)
    changed = rounded(steps(optimizers[0]))
    return weights, changed, type(optimizers[0].param_groups[0]["lr"])


# --- the step --------------------------------------------------------------------------------


@scenario
def closures(make):
    p, seen = param(1), []
    optimizer = make([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        seen.append(torch.is_grad_enabled())
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item(), optimizer.step(closure=closure).item()]
    # The second loss depends on the rounding of the first update.
    return [round(x, 3) for x in losses], seen, optimizer.step(), rounded([p])


@scenario
def parameters_without_gradients(make):
    optimizer = make([param(), param(1)], lr=0.1)
    before = optimizer.step()
    first, second = optimizer.param_groups[0]["params"]
    second.grad = torch.ones(4)
    optimizer.step()
    return before, rounded([first, second])


@scenario
def zero_grad(make):
    found = []
    for keywords in ({}, {"set_to_none": True}, {"set_to_none": False}):
        p = param()
        p.square().sum().backward()
        optimizer, grad = make([p]), p.grad
        optimizer.zero_grad(**keywords)
        found.append((p.grad is grad, grad.tolist()))
    return found


@scenario
def step_hooks(make):
    seen, optimizer, other = [], make([param()]), make([param()])
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("every pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("every post")),
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", o is optimizer))),
    ]
    try:
        optimizer.step()
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    return seen


@scenario
def a_pre_hook_replaces_the_arguments(make):
    optimizer = make([param()])
    optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: "replaced"), {}))
    result = optimizer.step(lambda: "given")
    optimizer.register_step_pre_hook(lambda *_: "no tuple")
    return result, errors_of([optimizer.step])


@scenario
def a_subclass_with_its_own_step(make):
    class Own(make):
        def step(self, closure=None):
            return "own", super().step(closure)

    optimizer, seen = Own([param()], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    return optimizer.step(lambda: 1), seen, rounded(steps(optimizer))


@scenario
def a_step_in_a_profile_has_its_name(make):
    optimizer = make([param()])
    with torch.profiler.profile() as profile:
        steps(optimizer, 1)
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages() if "Optimizer." in event.key}
    return sorted(names), callable(torch.optim.Optimizer.profile_hook_step(make.step))


@scenario
def a_scheduler_on_groups(make):
    optimizer = make([{"params": [param()]}, {"params": [param()], "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        steps(optimizer, 1)
        scheduler.step()
    weights = rounded(steps(optimizer, 1))
    return weights, [(g["lr"], g["initial_lr"]) for g in optimizer.param_groups]


# --- changes by the user ---------------------------------------------------------------------


@scenario
def state_cleared_and_parameters_replaced(make):
    optimizer = make([param(), param(1)], lr=0.1)
    steps(optimizer)
    optimizer.state.clear()
    cleared = rounded(steps(optimizer))
    optimizer.param_groups[0]["params"][0] = param(5)
    replaced = rounded(steps(optimizer))
    optimizer.param_groups[0]["params"][1].data = torch.zeros(4)
    return cleared, replaced, rounded(steps(optimizer))


@scenario
def state_is_a_dictionary_that_makes_entries(make):
    optimizer = make([param()])
    optimizer.state["own"]["key"] = 1
    return (
        dict(optimizer.state["own"]),
        dict(optimizer.state["other"]),
        issubclass(make, torch.optim.Optimizer),
    )


test_both_classes_do_the_same = scenario.test()
