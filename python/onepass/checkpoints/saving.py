"""Builds the state dict of an optimizer without changing the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..distributed.shards import shards_of
from ..engine.state_conversion import to_bytes
from ..engine.state_layouts import CODES_STEP, COMPANIONS
from ..engine.state_tracking import ParamState
from ..formats import VERSION
from ..rules import Rule
from ..rules.group_options import DEFAULTS, option


def saved_dict(
    param_groups: list[dict[str, Any]],
    optimizer_state: Mapping[Any, Any],
    rule: Rule,
    named: frozenset[str],
) -> dict[str, Any]:
    """The state dict of an optimizer before hooks, with positions in place of parameters.

    Args:
        param_groups, optimizer_state, rule: of the optimizer; they are only read.
        named: option keys that are saved even with default values.
    """
    owned = [(param, group) for group in param_groups for param in group["params"]]
    params = [param for param, _ in owned]
    rules = [rule.of(group) for _, group in owned]
    position: dict[Any, int] = {}
    for i, param in enumerate(params):
        position.setdefault(param, i)  # a parameter may be listed twice
    counters = {"step", *(scalar.key for scalar in rule.scalar_states)}
    groups = []
    for group in param_groups:
        packed = {key: value for key, value in group.items() if key != "params"}
        packed["params"] = [position[param] for param in group["params"]]
        if "states" in packed:
            packed["format_version"] = VERSION
        groups.append(packed)
    state = {
        position[key] if isinstance(key, torch.Tensor) else key: _entry(value, counters)
        for key, value in optimizer_state.items()
    }
    own = DEFAULTS.keys() - named
    changed = any(option(group, name) != DEFAULTS[name] for group in groups for name in own)
    if not changed:
        for i, one in enumerate(rules):
            if not one.saves_step:
                _drop_count(one, state, i)
    for param, shard in shards_of(params).items():
        i = position[param]
        if state.get(i):
            which = f"parameter {i} of shape {tuple(param.shape)}"
            state[i] = shard.saved(state[i], rules[i], which)
    return {"state": state, "param_groups": groups}


def _drop_count(rule: Rule, state: dict[Any, Any], i: int) -> None:
    """Removes a step counter that torch.optim does not save and that the rule does not need."""
    entry = state.get(i)
    if not isinstance(entry, dict) or "step" not in entry:
        return
    if float(entry.pop("step")) == 0.0:  # no step has been taken
        state[i] = entry = {key: value for key, value in entry.items() if key not in rule.keys}
    if not entry:
        del state[i]


def _entry(state: Any, counters: set[str]) -> Any:
    """A parameter's entry in a state dict.

    Args:
        state: the parameter's entry in ``optimizer.state``.
        counters: keys of tensors that parameters share; these tensors are cloned.
    """
    if isinstance(state, ParamState):
        state = state.started()
    if not isinstance(state, dict):
        return state
    saved = {key: value.clone() if key in counters else value for key, value in state.items()}
    saved.pop(CODES_STEP, None)
    for key in COMPANIONS & saved.keys():
        saved[key] = to_bytes(saved[key])
    if any(key.endswith("_scale") for key in saved) and "step" in saved:
        saved[CODES_STEP] = saved["step"].clone()
    return saved
