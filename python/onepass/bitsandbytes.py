"""Exchange of state dicts with bitsandbytes' optimizers, whose 8-bit format is ``dynamic8``.

bitsandbytes calls the states of a parameter state1 and state2; in 8 bits they are codes, beside
them absmax1 and absmax2, the scales of blocks of 256 elements, and qmap1 and qmap2, the values of
the codes. Parameters of fewer than 4096 elements have fp32 states. Newer versions nest all that
under one key. Neither library is needed for the other's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .formats import STATE_FORMATS, VERSION, scale_key
from .groups import DEFAULTS, option
from .optim.base import own_optimizer
from .reference.blocks import DYNAMIC_BLOCK, dynamic_map
from .states import fit_states

if TYPE_CHECKING:
    from .optim.base import Optimizer

NESTED = "__bnb_optimizer_quant_state__"
OLD_BLOCK = 2048  # of earlier versions
_MAP_ERROR = 1e-6  # their map depends on the processor's linspace in the last bit

# What state1 and state2 are.
STATES = {
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum",),
    "rmsprop": ("square_avg",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
}
DECOUPLED = ("adam", "lion")  # of every name: bitsandbytes' Adam decays as its AdamW does

# Options that bitsandbytes does not have, or that its steps do not read, by rule.
LACKING: dict[str, dict[str, Any]] = {
    "sgd": {"dampening": 0, "nesterov": False},
    "adagrad": {"lr_decay": 0, "eps_in_sqrt": False},
    "rmsprop": {"momentum": 0, "centered": False, "eps_in_sqrt": False},
    "adam": {"amsgrad": False},
    "lion": {},
}


def from_bitsandbytes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of bitsandbytes as one that ``optimizer.load_state_dict`` loads.

    With ``states="dynamic8"`` the codes and scales are taken as they are; other formats are
    converted when loading. fp32 states, which bitsandbytes keeps for small parameters, go to the
    format of their group likewise: give them a group with ``states="fp32"`` to keep them. Scales of
    blocks of 2048, of earlier versions, become those of blocks of 256: the values stay.

    The options of the groups come along, and so does what bitsandbytes did with them: its Adam
    decouples weight decay, its SGD has neither dampening nor Nesterov, its RMSprop no momentum.

    Args:
        optimizer: of the class that corresponds; only read.
        state_dict: what ``state_dict()`` of an optimizer of bitsandbytes gave, or its checkpoint;
            only read. The result shares tensors with it.

    Raises:
        ValueError: states of another kind of optimizer; codes of another map or block size, or in
            another order than the contiguous one, about which bitsandbytes' own backends differ.
    """
    rule = own_optimizer(optimizer).rule.name
    state = {
        number: _imported_state(rule, number, saved)
        for number, saved in state_dict["state"].items()
    }
    groups = []
    for group in state_dict["param_groups"]:
        betas = tuple(float(beta) for beta in group["betas"])
        own: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if rule in ("adam", "lion"):
            own["betas"] = betas[:2]
        elif rule == "sgd":
            own["momentum"] = betas[0]
        elif rule == "rmsprop":
            own["alpha"] = betas[0]
        if rule in ("adam", "rmsprop", "adagrad"):
            own["eps"] = group["eps"]
        own |= LACKING[rule]
        own |= {"maximize": False, "decoupled_weight_decay": rule in DECOUPLED}
        own |= {"states": "dynamic8", "format_version": VERSION, "params": group["params"]}
        groups.append(own)
    return {"state": state, "param_groups": groups}


def to_bitsandbytes(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state as the optimizer of bitsandbytes that corresponds loads it.

    fp32 states stay fp32, as bitsandbytes has them of small parameters. All others go as
    ``dynamic8``: unchanged if they are, else rounded to nearest. Companions of weights stay behind
    (:func:`full_precision_state_dict` has what they hold), and so does the seed. Nothing is
    changed; the result has tensors of its own.

    Raises:
        ValueError: an option of a group that bitsandbytes lacks; names it.
    """
    optimizer = own_optimizer(optimizer)
    rule = optimizer.rule
    for i, group in enumerate(optimizer.param_groups):
        _check_exportable(rule.name, i, group)
    plain = optimizer.state_dict()
    state, groups = {}, []
    for group, saved_group in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        for number, param in zip(saved_group["params"], group["params"], strict=True):
            held = plain["state"].get(number)
            if held:
                held.setdefault("step", optimizer.state[param]["step"])  # SGD may not save it
                state[number] = _exported_state(optimizer, group, param, held, number)
        groups.append({**_exported_options(rule.name, group), "params": saved_group["params"]})
    return {"state": state, "param_groups": groups}


def _imported_state(rule: str, number: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    saved = {**saved, **saved.get(NESTED, {})}
    names = STATES[rule]
    found = [name for name in ("state1", "state2") if name in saved]
    if not found:
        if not saved:
            return {}
        raise ValueError(
            f"parameter {number} has {', '.join(map(str, saved))} but no state1: it is not a state "
            "dict of bitsandbytes"
        )
    if len(found) != len(names):
        raise ValueError(
            f"parameter {number} has {' and '.join(found)}: {rule} has {len(names)} state(s), so "
            "this is of another kind of optimizer"
        )
    held: dict[str, Any] = {"step": saved["step"]}
    for i, key in enumerate(names, 1):
        which = f"state{i} of parameter {number}"
        held[key] = saved[f"state{i}"]
        if not held[key].is_contiguous():
            raise ValueError(
                f"{which} must be contiguous; got strides {held[key].stride()}: bitsandbytes reads "
                "such a state in the order of its indices on a CPU, of its memory on a GPU"
            )
        if held[key].dtype == torch.uint8:
            held[scale_key(key)] = _imported_scales(saved, i, which)
        elif held[key].dtype != torch.float32:
            raise ValueError(f"{which} must be uint8 or float32; got {held[key].dtype}")
    return held


def _imported_scales(saved: Mapping[str, Any], i: int, which: str) -> torch.Tensor:
    codes, scales, qmap = saved[f"state{i}"], saved.get(f"absmax{i}"), saved.get(f"qmap{i}")
    if scales is None or qmap is None:
        raise ValueError(f"{which} is in 8 bits but without absmax{i} or qmap{i}: not in blocks")
    ours = torch.from_numpy(dynamic_map(signed=i == 1))
    if qmap.shape != ours.shape or (qmap.cpu().float() - ours).abs().max() > _MAP_ERROR:
        raise ValueError(f"{which}: qmap{i} must be bitsandbytes' dynamic map")
    blocks = -(-codes.numel() // DYNAMIC_BLOCK)
    if scales.shape == (blocks,):
        return scales
    if scales.shape == (-(-codes.numel() // OLD_BLOCK),):
        return scales.repeat_interleave(OLD_BLOCK // DYNAMIC_BLOCK)[:blocks].clone()
    raise ValueError(
        f"absmax{i} of {which} must be ({blocks},), of blocks of {DYNAMIC_BLOCK} (or "
        f"{OLD_BLOCK}); got {tuple(scales.shape)}"
    )


def _check_exportable(rule: str, i: int, group: Mapping[str, Any]) -> None:
    for name, needed in {**LACKING[rule], "maximize": False}.items():
        if group.get(name, DEFAULTS.get(name)) != needed:
            raise ValueError(
                f"{name} of parameter group {i} must be {needed} for bitsandbytes, which has "
                f"nothing else; got {group[name]}"
            )
    if rule == "sgd" and not group["momentum"]:
        raise ValueError(f"momentum of parameter group {i} must be > 0 for bitsandbytes; got 0")
    decoupled = rule in DECOUPLED
    if group["weight_decay"] and option(group, "decoupled_weight_decay") != decoupled:
        raise ValueError(
            f"decoupled_weight_decay of parameter group {i} must be {decoupled} for bitsandbytes, "
            f"which decays so; got {group['decoupled_weight_decay']}"
        )


def _exported_options(rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": float(group["lr"]), "eps": float(group.get("eps", 0.0))}
    options["weight_decay"] = float(group["weight_decay"])
    if rule == "sgd":
        options["betas"] = (float(group["momentum"]), 0.0)
    elif rule == "rmsprop":
        options["betas"] = (float(group["alpha"]), 0.0)
    elif rule == "adagrad":
        options["betas"] = (0.0, 0.0)
    else:
        options["betas"] = tuple(float(beta) for beta in group["betas"])
    if rule == "adam":
        options |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return options


def _exported_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    param: torch.Tensor,
    held: Mapping[str, Any],
    number: int,
) -> dict[str, Any]:
    name = option(group, "states")
    form = STATE_FORMATS["fp32" if name == "fp32" else "dynamic8"]
    which = f"parameter {number} of shape {tuple(param.shape)}"
    if not param.is_contiguous():
        # bitsandbytes makes its parameters contiguous, and cuts blocks in that order.
        wide = STATE_FORMATS["fp32"]
        held = {"step": held["step"]} | fit_states(held, param, optimizer.rule, wide, which)
        param = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    states = fit_states(held, param, optimizer.rule, form, which, copy=True)
    exported: dict[str, Any] = {"step": int(held["step"])}
    for i, key in enumerate(STATES[optimizer.rule.name], 1):
        exported[f"state{i}"] = states[key]
        if form.scale is not None:
            exported[f"absmax{i}"] = states[scale_key(key)]
            exported[f"qmap{i}"] = torch.tensor(
                dynamic_map(signed=i == 1), dtype=torch.float32, device=param.device
            )
    return exported
