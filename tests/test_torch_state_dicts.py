"""State dicts, their hooks and copies: onepass optimizers behave like those of torch.optim."""

from __future__ import annotations

import copy
import pickle

import torch

from .torch_scenarios import Scenarios, errors_of, param, steps

scenario = Scenarios()


# --- state dicts -----------------------------------------------------------------------------


@scenario
def a_state_dict_round_trip_continues_in_the_same_bits(make):
    first = make([param(), param(1)], lr=0.1)
    steps(first)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
    second = make(copies, lr=0.7)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    pairs = zip(steps(first), steps(second), strict=True)
    return all(torch.equal(p, q) for p, q in pairs), second.param_groups[0]["lr"]


@scenario
def states_of_the_wrong_model(make):
    one, two = make([param()]), make([param(), param()])
    groups = make([{"params": [param()]}, {"params": [param()]}])
    loads = [(one, groups), (one, two), (groups, two), (two, groups)]
    errors = errors_of([lambda a=a, b=b: a.load_state_dict(b.state_dict()) for a, b in loads])
    return errors, errors_of([lambda: one.load_state_dict({})])


@scenario
def unknown_entries_of_a_state_dict_are_kept(make):
    optimizer = make([param()])
    steps(optimizer)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["own"] = 5
    saved = optimizer.state_dict()
    saved["param_groups"][0]["own"] = "value"
    saved["state"]["global"] = 2
    other = make([param()])
    other.load_state_dict(saved)
    again = other.state_dict()
    return again["param_groups"][0]["own"], again["state"]["global"], again["state"][0]["own"]


@scenario
def loading_does_not_change_the_state_dict(make):
    first, second = make([param()], lr=0.1), make([param()])
    steps(first)
    saved = copy.deepcopy(first.state_dict())
    before = pickle.dumps(saved)
    second.load_state_dict(saved)
    return pickle.dumps(saved) == before


@scenario
def names_of_parameters_in_a_state_dict(make):
    layer = torch.nn.Linear(2, 2)
    named, unnamed = make(layer.named_parameters()), make(layer.parameters())
    saved = named.state_dict(), unnamed.state_dict()
    unnamed.load_state_dict(saved[0])
    named.load_state_dict(saved[1])
    return [o.param_groups[0].get("param_names") for o in (named, unnamed)]


@scenario
def order_of_state_dict_hooks(make):
    optimizer, seen = make([param()]), []
    steps(optimizer)
    handles = [
        register(
            lambda *_, kind=kind, place=place: seen.append((kind, place)), prepend=place == "front"
        )
        for kind, register in {
            "save pre": optimizer.register_state_dict_pre_hook,
            "save post": optimizer.register_state_dict_post_hook,
            "load pre": optimizer.register_load_state_dict_pre_hook,
            "load post": optimizer.register_load_state_dict_post_hook,
        }.items()
        for place in ("back", "front")
    ]
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles[::2]:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    return seen


@scenario
def hooks_that_replace_a_state_dict(make):
    optimizer = make([param()], lr=0.5)

    def halve(_, state_dict):
        group = {**state_dict["param_groups"][0], "lr": 0.25}
        return {**state_dict, "param_groups": [group]}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "own": 1})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    return saved["own"], saved["param_groups"][0]["lr"], optimizer.param_groups[0]["lr"]


@scenario
def hooks_that_see_what_is_saved(make):
    """A hook sees the saved dict, with states by index and all keys; it may return anything."""
    optimizer, seen = make([param(), param()]), []
    steps(optimizer)
    optimizer.register_state_dict_post_hook(lambda _, d: seen.append(d))
    saved = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda _, d: {"inner": d})
    nested = optimizer.state_dict()
    same = seen[0] is saved, seen[1] is nested["inner"]
    return same, {i: sorted(s) for i, s in saved["state"].items()}, sorted(nested)


# --- copies ----------------------------------------------------------------------------------


@scenario
def copies_are_independent_and_continue_in_the_same_bits(make):
    found = []
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        first = make([param()], lr=0.1)
        steps(first)
        second = copied(first)
        (p,), (q,) = (o.param_groups[0]["params"] for o in (first, second))
        steps(first)
        apart = not torch.equal(p, q)
        steps(second)
        found.append((apart, torch.equal(p, q)))
    return found


@scenario
def hooks_do_not_go_into_a_pickle(make):
    optimizer, seen = make([param()]), []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    steps(pickle.loads(pickle.dumps(optimizer)))
    return seen


@scenario
def a_model_and_its_optimizer_in_one_copy(make):
    layer = torch.nn.Linear(2, 2)
    pair = copy.deepcopy((layer, make(layer.parameters())))
    return [
        p is q for p, q in zip(pair[0].parameters(), pair[1].param_groups[0]["params"], strict=True)
    ]


test_both_classes_do_the_same = scenario.test()
