"""What a state dict says, fitted to an optimizer; nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

from ..distributed.shards import shard_of
from ..engine.state_conversion import fit_companion, fit_ema, fit_states, packed_order
from ..engine.state_layouts import CODES_STEP, COMPANIONS, EMA, STRIDE, Home
from ..engine.state_tracking import ParamState
from ..engine.validation import check_weight_format
from ..formats import STATE_FORMATS, VERSION, WEIGHT_FORMATS, readable, scale_key
from ..rules import Rule
from ..rules.group_options import drop_defaults, option

# Options that describe this run, not the state of training: loading a state dict keeps them.
_OWN_OPTIONS = ("states", "weights", "ema_decay", "format_version")


def loaded_groups(
    own_groups: list[dict[str, Any]],
    saved_groups: list[dict[str, Any]],
    named: frozenset[str],
    check_options: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """The groups of an optimizer with the options of a state dict, checked; changes nothing.

    Args:
        own_groups: of the optimizer.
        saved_groups: of the state dict.
        named: keys that groups have even with default options.
        check_options: raises ValueError for an option of a group that is out of range.

    Raises:
        ValueError: the state dict has other groups, an option out of range, or formats of a newer
            onepass.
    """
    if len(saved_groups) != len(own_groups):
        raise ValueError(
            f"the state dict has {len(saved_groups)} parameter groups, "
            f"the optimizer {len(own_groups)}"
        )
    groups: list[dict[str, Any]] = []
    # One copy: a tensor that groups share, such as a learning rate, is shared by the copies.
    copies = deepcopy([{k: v for k, v in g.items() if k != "params"} for g in saved_groups])
    pairs = zip(own_groups, saved_groups, copies, strict=True)
    for i, (group, saved, copied) in enumerate(pairs):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"parameter group {i} has {len(saved['params'])} parameters in the state dict, "
                f"{len(group['params'])} in the optimizer"
            )
        version = saved.get("format_version", VERSION)
        if not readable(version, saved.get("states", "fp32")):
            raise ValueError(
                f"parameter group {i} of the state dict has {saved.get('states', 'fp32')} states "
                f"of version {version}; this onepass knows version {VERSION}: load it with the "
                "onepass that saved it"
            )
        merged = {**group, **copied}
        # A missing seed stands for 0. A missing eps_in_sqrt or decoupled_weight_decay changes
        # nothing: state dicts of torch.optim lack them, and they choose the algorithm.
        if "seed" not in copied:
            merged["seed"] = 0
        merged.update({name: option(group, name) for name in _OWN_OPTIONS})
        drop_defaults(merged, named)
        check_options(merged)
        groups.append(merged)
    return groups


def loaded_state(
    rule: Rule,
    saved: Mapping[str, Any],
    param: torch.Tensor,
    number: int,
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
    home: Home | None,
    kind: str,
) -> ParamState:
    """What a state dict has of a parameter, in the formats of its group; changes nothing.

    Args:
        rule: of the optimizer.
        saved: the parameter's entry of the state dict.
        param, number: the parameter and its position in the optimizer.
        group, saved_group: its group in the optimizer and in the state dict.
        home: where the states are stored; None for the parameter's device.
        kind: name of the optimizer's class.

    Raises:
        ValueError: the state belongs to another model or another kind of optimizer.
    """
    shard = shard_of(param)
    which = f"parameter {number} of shape {tuple(param.shape)}"
    check_weight_format(param, option(group, "weights"), which)
    # torch.distributed.checkpoint fills in empty dictionaries for what a flat state dict lacks.
    saved = {k: v for k, v in saved.items() if v is not None and not (v == {} and type(v) is dict)}
    if shard is not None:
        param, saved = shard.local, shard.inner(saved, rule)
    if saved_group.get("format_version", VERSION) < 3:
        saved = _signed_mx4(saved, param, rule, option(saved_group, "states"))
    _check_complete(saved, rule, which, kind)
    _check_codes(saved, which)
    form, weight = STATE_FORMATS[option(group, "states")], WEIGHT_FORMATS[option(group, "weights")]
    states = fit_states(saved, param, rule, form, which, copy=True, home=home)
    state = _kept(saved, rule)
    if states:
        state.update(states, **packed_order(param, form))
    if any(key in saved for key in COMPANIONS):
        companion = fit_companion(saved, param, weight, which, copy=True, home=home)
        if companion is not None:
            state[weight.key] = companion
    if EMA in saved and option(group, "ema_decay") is not None:
        state[EMA] = fit_ema(saved, param, which, copy=True, home=home)
    if shard is not None:
        own = {key: state[key] for key in state if key in _tensor_keys(rule)}
        state.update(shard.wrapped(own, rule, form))
    # Lion, RMSprop and SGD run without the count, which other libraries do not save for them:
    # it then starts here. With 0 SGD would ignore the buffer that was loaded.
    if state:
        taken = 1.0 if rule.needs_first and states else 0.0
        state.setdefault("step", torch.tensor(taken, dtype=torch.float32, device="cpu"))
    return state


def _check_complete(saved: Mapping[str, Any], rule: Rule, which: str, kind: str) -> None:
    """Raises ValueError where a saved state lacks what every state of the rule has."""
    # A state that an option adds (amsgrad, momentum) is made when the option is first used.
    missing = [slot.key for slot in rule.slots if slot.flag is None and slot.key not in saved]
    if rule.needs_step and "step" not in saved:
        missing.append("step")
    missing += [scalar.key for scalar in rule.scalar_states if scalar.key not in saved]
    if saved and missing:
        raise ValueError(
            f"the state dict has no {', '.join(missing)} for {which}, only "
            f"{', '.join(map(str, saved)) or 'nothing'}: it is of another kind of optimizer "
            f"than {kind}"
        )


def _check_codes(saved: Mapping[str, Any], which: str) -> None:
    """Raises ValueError where codes are of another step than the rest of the state."""
    beside = saved.get(CODES_STEP)
    if beside is not None and "step" in saved and float(beside) != float(saved["step"]):
        raise ValueError(
            f"the codes of {which} are of step {float(beside):g}, its counter of step "
            f"{float(saved['step']):g}: a checkpoint in another format was loaded over them. "
            "Load it into an optimizer of its own format, or convert it by "
            "onepass.convert_state_dict"
        )


def _tensor_keys(rule: Rule) -> set[str]:
    """The keys of a state that are not counters."""
    moments = set(rule.keys)
    return moments | {scale_key(key) for key in moments} | COMPANIONS | {STRIDE, EMA}


def _kept(saved: Mapping[str, Any], rule: Rule) -> ParamState:
    """What is loaded of a state besides its tensors: counters, and keys of others."""
    known = _tensor_keys(rule) | {CODES_STEP}
    counters = {"step", *(scalar.key for scalar in rule.scalar_states)}
    state = ParamState()
    for key, value in saved.items():
        if key in counters:
            state[key] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif key not in known:
            state[key] = deepcopy(value)
    return state


def _signed_mx4(
    saved: Mapping[str, Any], param: torch.Tensor, rule: Rule, states: str
) -> dict[str, Any]:
    """The state of a parameter with codes of mx4 as int8; until version 2 they were uint8. By shape
    they are told from those of mx8, and where both have one element by the group's format."""
    signed = dict(saved)
    for key in rule.keys:
        codes, scales = saved.get(key), saved.get(scale_key(key))
        if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor):
            continue
        packed = codes.shape != param.shape or (param.shape in ((0,), (1,)) and states == "mx4")
        if packed and scales.dim() and codes.dtype == scales.dtype == torch.uint8:
            signed[key] = codes.view(torch.int8)
    return signed
