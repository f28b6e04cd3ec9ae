"""Imports and exports state dicts of bitsandbytes' optimizers, whose 8-bit format is ``dynamic8``.

In bitsandbytes, ``state1`` and ``state2`` are the states of a parameter. 8-bit states are codes,
with the block scales in ``absmax1`` and ``absmax2`` (one per 256 elements) and the values of the
codes in ``qmap1`` and ``qmap2``. Parameters of fewer than 4096 elements have fp32 states. Newer
versions nest these keys under one key. The conversion does not need bitsandbytes to be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..engine.state_conversion import fit_states
from ..formats import STATE_FORMATS, VERSION, scale_key
from ..formats.dynamic8 import DYNAMIC_BLOCK, dynamic_map
from ..optim.base import Optimizer, own_optimizer
from ..rules.base import BitsAndBytes, Rule
from ..rules.group_options import DEFAULTS, option

NESTED = "__bnb_optimizer_quant_state__"
OLD_BLOCK = 2048  # elements per scale in earlier versions
_MAP_ERROR = 1e-6  # bitsandbytes' map varies by rounding of linspace on different processors


def from_bitsandbytes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a bitsandbytes state dict to one that ``optimizer.load_state_dict`` accepts.

    Loading with ``states="dynamic8"`` keeps codes and scales exactly; other formats are converted.
    The fp32 states of small parameters are also converted to the format of their group: put these
    parameters into a group with ``states="fp32"`` to keep them exact. Scales of 2048-element blocks
    from earlier versions are repeated for 256-element blocks, which does not change the values.

    The options of the groups are converted too, including those that bitsandbytes fixes: its Adam
    uses decoupled weight decay, its SGD has no dampening and no Nesterov momentum, and its RMSprop
    has no momentum.

    Args:
        optimizer: an optimizer of the corresponding class; it is only read.
        state_dict: the result of ``state_dict()`` of a bitsandbytes optimizer; it is only read. The
            returned state dict shares tensors with it.

    Raises:
        ValueError: the states belong to another kind of optimizer, or the codes have another map or
            block size or are not contiguous. bitsandbytes' backends read non-contiguous codes in
            different orders.
    """
    optimizer = own_optimizer(optimizer)
    rule = optimizer.rule
    theirs = _counterpart(rule)
    state = {
        number: _imported_state(rule, number, saved)
        for number, saved in state_dict["state"].items()
    }
    groups = []
    for group in state_dict["param_groups"]:
        own: dict[str, Any] = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        betas = tuple(float(beta) for beta in group["betas"])
        if theirs.betas:
            count = len(optimizer.defaults["betas"]) if theirs.betas == "betas" else 0
            own[theirs.betas] = betas[:count] if count else betas[0]
        if "eps" in optimizer.defaults:
            own["eps"] = group["eps"]
        own |= {name: group[name] for name in theirs.same}
        own |= theirs.lacking
        own |= {"maximize": False, "decoupled_weight_decay": theirs.decoupled}
        own |= {"states": "dynamic8", "format_version": VERSION, "params": group["params"]}
        groups.append(own)
    return {"state": state, "param_groups": groups}


def to_bitsandbytes(optimizer: Optimizer) -> dict[str, Any]:
    """Exports a state dict that the corresponding bitsandbytes optimizer can load.

    fp32 states remain fp32, the format that bitsandbytes uses for small parameters. ``dynamic8``
    states are copied exactly; states of all other formats are rounded to the nearest ``dynamic8``
    codes. The seed and the companions of weights are not exported; use
    :func:`full_precision_state_dict` to save the weights exactly. The optimizer is not changed, and
    the result has its own tensors.

    Args:
        optimizer: the optimizer to export.

    Raises:
        ValueError: bitsandbytes does not support an option of a group; the message names it.
    """
    optimizer = own_optimizer(optimizer)
    rule = optimizer.rule
    theirs = _counterpart(rule)
    for i, group in enumerate(optimizer.param_groups):
        _check_exportable(theirs, i, group)
    plain = optimizer.state_dict()
    state, groups = {}, []
    for group, saved_group in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        for number, param in zip(saved_group["params"], group["params"], strict=True):
            held = plain["state"].get(number)
            if held:
                held.setdefault("step", optimizer.state[param]["step"])  # SGD may not save it
                state[number] = _exported_state(optimizer, group, param, held, number)
        groups.append({**_exported_options(theirs, group), "params": saved_group["params"]})
    return {"state": state, "param_groups": groups}


def _counterpart(rule: Rule) -> BitsAndBytes:
    """The description of the bitsandbytes optimizer that corresponds to a rule.

    Raises:
        ValueError: bitsandbytes has no such optimizer.
    """
    if rule.bitsandbytes is None:
        raise ValueError(
            f"bitsandbytes has no optimizer with the states of {rule.name}: the state dict cannot "
            "be exchanged"
        )
    return rule.bitsandbytes


def _imported_state(rule: Rule, number: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the state of one parameter from bitsandbytes' keys."""
    saved = {**saved, **saved.get(NESTED, {})}
    names = _counterpart(rule).states
    found = [name for name in ("state1", "state2") if name in saved]
    if not found:
        if not saved:
            return {}
        raise ValueError(
            f"parameter {number} has {', '.join(map(str, saved))} but no state1: this is not a "
            "state dict of bitsandbytes"
        )
    if len(found) != len(names):
        raise ValueError(
            f"parameter {number} has {' and '.join(found)}: {rule.name} has {len(names)} state(s), "
            "so the state dict is of another kind of optimizer"
        )
    held: dict[str, Any] = {"step": saved["step"]}
    for i, name in enumerate(names, 1):
        which = f"state{i} of parameter {number}"
        stored = saved[f"state{i}"]
        if not stored.is_contiguous():
            raise ValueError(
                f"{which} must be contiguous; got strides {stored.stride()}. bitsandbytes reads "
                "such a state in index order on a CPU and in memory order on a GPU, so its values "
                "are ambiguous"
            )
        if stored.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"{which} must be uint8 or float32; got {stored.dtype}")
        scales, qmap = saved.get(f"absmax{i}"), saved.get(f"qmap{i}")
        quantized = stored.dtype == torch.uint8
        if quantized and (scales is None or qmap is None):
            raise ValueError(
                f"{which} is uint8, so absmax{i} and qmap{i} are needed (block-wise quantization); "
                f"got {', '.join(map(str, saved))}"
            )
        for part, key in enumerate([name] if isinstance(name, str) else name):
            codes = stored
            if not isinstance(name, str):
                codes = _part(stored, part, len(name), which)
            held[key] = codes
            if scales is not None and qmap is not None and quantized:
                part_scales = scales
                if not isinstance(name, str):
                    part_scales = _part(scales, part, len(name), f"absmax{i} of parameter {number}")
                held[scale_key(key)] = _imported_scales(codes, part_scales, qmap, i, which)
    return held


def _part(tensor: torch.Tensor, part: int, parts: int, which: str) -> torch.Tensor:
    """A part of a tensor of bitsandbytes that stacks several states."""
    if tensor.shape[:1] != (parts,):
        raise ValueError(
            f"{which} must be a stack of {parts} states; got a tensor of {tuple(tensor.shape)}"
        )
    return tensor[part]


def _imported_scales(
    codes: torch.Tensor, scales: torch.Tensor, qmap: torch.Tensor, i: int, which: str
) -> torch.Tensor:
    """The scales of a part of state i for blocks of 256 elements, after a check of its code map."""
    ours = torch.from_numpy(dynamic_map(signed=i == 1))
    if qmap.shape != ours.shape or (qmap.cpu().float() - ours).abs().max() > _MAP_ERROR:
        raise ValueError(f"qmap{i} of {which} must be the dynamic map of bitsandbytes")
    blocks = -(-codes.numel() // DYNAMIC_BLOCK)
    if scales.shape == (blocks,):
        return scales
    if scales.shape == (-(-codes.numel() // OLD_BLOCK),):
        return scales.repeat_interleave(OLD_BLOCK // DYNAMIC_BLOCK)[:blocks].clone()
    raise ValueError(
        f"absmax{i} of {which} must have the shape ({blocks},), one scale per {DYNAMIC_BLOCK} "
        f"elements (or per {OLD_BLOCK} elements); got {tuple(scales.shape)}"
    )


def _check_exportable(theirs: BitsAndBytes, i: int, group: Mapping[str, Any]) -> None:
    """Raises ValueError if bitsandbytes does not support an option of group i."""
    for name, needed in {**theirs.lacking, "maximize": False}.items():
        if group.get(name, DEFAULTS.get(name)) != needed:
            raise ValueError(
                f"{name} of parameter group {i} must be {needed}, because bitsandbytes supports "
                f"no other value; got {group[name]}"
            )
    if theirs.betas == "momentum" and not group["momentum"]:
        raise ValueError(f"momentum of parameter group {i} must be > 0 for bitsandbytes; got 0")
    decoupled = theirs.decoupled
    if group["weight_decay"] and option(group, "decoupled_weight_decay") != decoupled:
        raise ValueError(
            f"decoupled_weight_decay of parameter group {i} must be {decoupled}, as in "
            f"bitsandbytes; got {group['decoupled_weight_decay']}"
        )


def _exported_options(theirs: BitsAndBytes, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group under bitsandbytes' keys."""
    betas: Any = group[theirs.betas] if theirs.betas else 0.0
    return {
        "lr": float(group["lr"]),
        "eps": float(group.get("eps", 0.0)),
        "weight_decay": float(group["weight_decay"]),
        "betas": tuple(map(float, betas)) if theirs.betas == "betas" else (float(betas), 0.0),
        **{name: group[name] for name in theirs.same},
        **theirs.extra,
    }


def _exported_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    param: torch.Tensor,
    held: Mapping[str, Any],
    number: int,
) -> dict[str, Any]:
    """Converts the state of one parameter to bitsandbytes' keys."""
    name = option(group, "states")
    form = STATE_FORMATS["fp32" if name == "fp32" else "dynamic8"]
    which = f"parameter {number} of shape {tuple(param.shape)}"
    if not param.is_contiguous():
        # bitsandbytes makes parameters contiguous and cuts blocks in contiguous order.
        wide = STATE_FORMATS["fp32"]
        held = {"step": held["step"]} | fit_states(held, param, optimizer.rule, wide, which)
        param = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    states = fit_states(held, param, optimizer.rule, form, which, copy=True)
    exported: dict[str, Any] = {"step": int(held["step"])}
    for i, name in enumerate(_counterpart(optimizer.rule).states, 1):
        exported[f"state{i}"] = _stacked(states, name)
        if form.scale is not None:
            keys = scale_key(name) if isinstance(name, str) else tuple(map(scale_key, name))
            exported[f"absmax{i}"] = _stacked(states, keys)
            exported[f"qmap{i}"] = torch.tensor(
                dynamic_map(signed=i == 1), dtype=torch.float32, device=param.device
            )
    return exported


def _stacked(states: Mapping[str, torch.Tensor], name: str | tuple[str, ...]) -> torch.Tensor:
    """The state of a key, or the states of several keys as one tensor."""
    return states[name] if isinstance(name, str) else torch.stack([states[key] for key in name])
