"""Converts a loaded state dict for an optimizer without changing the optimizer."""

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

# Options that describe this run, not the training state. Loading a state dict does not change them.
_OWN_OPTIONS = ("states", "weights", "ema_decay", "format_version")


def loaded_groups(
    own_groups: list[dict[str, Any]],
    saved_groups: list[dict[str, Any]],
    named: frozenset[str],
    check_options: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """The groups of an optimizer with the options of a state dict, after a check.

    Args:
        own_groups: the parameter groups of the optimizer; they are only read.
        saved_groups: the parameter groups of the state dict; they are only read.
        named: option keys that groups have even with default values.
        check_options: raises ValueError if an option of a group is out of range.

    Raises:
        ValueError: the groups do not match the optimizer's, an option is out of range, or a format
            belongs to a newer version of onepass.
    """
    if len(saved_groups) != len(own_groups):
        raise ValueError(
            f"the state dict has {len(saved_groups)} parameter groups, "
            f"the optimizer {len(own_groups)}"
        )
    groups: list[dict[str, Any]] = []
    # A single deepcopy call, so that copies still share a tensor that groups share, such as lr.
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
                f"of version {version}; this version of onepass reads version {VERSION}: load the "
                "state dict with the version of onepass that saved it"
            )
        merged = {**group, **copied}
        # A missing seed means 0. A missing eps_in_sqrt or decoupled_weight_decay keeps the
        # optimizer's value, because torch.optim does not save these options.
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
    """Converts the saved state of a parameter to the formats of its group; changes nothing.

    Args:
        rule: the rule of the optimizer.
        saved: the parameter's entry in the state dict.
        param, number: the parameter and its position in the optimizer.
        group, saved_group: the parameter's group in the optimizer and in the state dict.
        home: where the states are stored; None for the parameter's device.
        kind: name of the optimizer's class.

    Raises:
        ValueError: the state belongs to another model or another kind of optimizer.
    """
    rule = rule.of(group)
    shard = shard_of(param)
    which = f"parameter {number} of shape {tuple(param.shape)}"
    check_weight_format(param, option(group, "weights"), which)
    # torch.distributed.checkpoint adds empty dictionaries for keys that a flat state dict lacks.
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
    # Other libraries do not save the step counter of Lion, RMSprop and SGD, which do not need it.
    # The counter then starts at 0, or at 1 for SGD with a buffer, because SGD's first step (count
    # 0) would ignore the loaded buffer.
    if state:
        taken = 1.0 if rule.needs_first and states else 0.0
        state.setdefault("step", torch.tensor(taken, dtype=torch.float32, device="cpu"))
    return state


def _check_complete(saved: Mapping[str, Any], rule: Rule, which: str, kind: str) -> None:
    """Raises ValueError if a saved state lacks a key that the rule requires."""
    # A state that belongs to an option (amsgrad, momentum) is optional: it is created at first use.
    missing = [slot.key for slot in rule.slots if slot.flag is None and slot.key not in saved]
    if rule.needs_step and "step" not in saved:
        missing.append("step")
    missing += [scalar.key for scalar in rule.scalar_states if scalar.key not in saved]
    if saved and missing:
        raise ValueError(
            f"the state dict has no {', '.join(missing)} for {which}, only "
            f"{', '.join(map(str, saved)) or 'no state'}: it is of another kind of optimizer "
            f"than {kind}"
        )


def _check_codes(saved: Mapping[str, Any], which: str) -> None:
    """Raises ValueError if the codes were saved at another step than the step counter."""
    beside = saved.get(CODES_STEP)
    if beside is not None and "step" in saved and float(beside) != float(saved["step"]):
        raise ValueError(
            f"the codes of {which} are of step {float(beside):g}, but its step counter is "
            f"{float(saved['step']):g}: a checkpoint in another format was loaded over them. "
            "Load it into an optimizer with its own format, or convert it with "
            "onepass.convert_state_dict"
        )


def _tensor_keys(rule: Rule) -> set[str]:
    """The keys of all state tensors except counters."""
    moments = set(rule.keys)
    return moments | {scale_key(key) for key in moments} | COMPANIONS | {STRIDE, EMA}


def _kept(saved: Mapping[str, Any], rule: Rule) -> ParamState:
    """The counters of a saved state, and a copy of its unknown keys."""
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
    """Views mx4 codes of format versions 1 and 2, which are uint8, as int8.

    The shape distinguishes mx4 codes from mx8 codes. If the shapes are equal (at most one element),
    the saved format name decides.
    """
    signed = dict(saved)
    for key in rule.keys:
        codes, scales = saved.get(key), saved.get(scale_key(key))
        if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor):
            continue
        packed = codes.shape != param.shape or (param.shape in ((0,), (1,)) and states == "mx4")
        if packed and scales.dim() and codes.dtype == scales.dtype == torch.uint8:
            signed[key] = codes.view(torch.int8)
    return signed
