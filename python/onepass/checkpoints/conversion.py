"""Converts state dicts to other formats, and exports a model's weights in fp32."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..distributed.shards import full_weight
from ..engine.state_layouts import COMPANIONS
from ..engine.state_tracking import ParamState
from ..engine.validation import check_weight_format
from ..optim.base import Optimizer, own_optimizer
from ..rules.group_options import option


def convert_state_dict(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    states: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Converts a state dict of onepass or torch.optim to other formats.

    ``load_state_dict`` already converts to the optimizer's own formats. Use this function for other
    readers. torch.optim can load the result of ``states="fp32", weights="native"``.

    Args:
        optimizer: an optimizer of the same class, model and groups as the state dict; it is only
            read. Its current weights are used to convert companions, so load the model's weights
            first.
        state_dict: the state dict; it is only read.
        states: format of the states of all groups; None for the format of each optimizer group.
        weights: format of all 16-bit weights; None for the format of each optimizer group.
            ``"native"`` drops the extra bits in companions: also save
            :func:`full_precision_state_dict`.

    Returns:
        A new state dict with its own tensors. Conversion rounds to nearest; conversion of states to
        fp32 is exact.

    Raises:
        ValueError: as ``optimizer.load_state_dict``. Also raised if a format is unknown or does not
            support the dtype of a weight.
    """
    optimizer = own_optimizer(optimizer)
    groups = []
    for group in optimizer.param_groups:
        group = {**group, "states": states or option(group, "states")}
        if weights is not None and any(p.dtype != torch.float32 for p in group["params"]):
            group["weights"] = weights
        optimizer.check_options(group)
        for param in group["params"]:
            check_weight_format(
                param, option(group, "weights"), f"a parameter of {tuple(param.shape)}"
            )
        groups.append(group)
    # Load into a copy without the optimizer's hooks, which are for state dicts loaded into it.
    twin = object.__new__(type(optimizer))
    twin.__setstate__(
        {
            "defaults": dict(optimizer.defaults),
            "state": defaultdict(ParamState),
            "param_groups": groups,
            "backend": optimizer.backend,
            "paging": optimizer.paging,
            "_given": optimizer._given,
            "scales_in_step": optimizer.scales_in_step,
        }
    )
    twin.load_state_dict(state_dict)
    return twin.state_dict()


def full_precision_state_dict(model: torch.nn.Module, *optimizers: Optimizer) -> dict[str, Any]:
    """``model.state_dict()`` with full-precision fp32 weights.

    A weight with a companion (``kahan``, ``master``, ``split16``, ``split8``) is replaced by the
    float32 value that weight and companion represent together, with the weight's shape and strides.
    All other entries share memory with the model. All names of a shared parameter refer to the same
    tensor. Nothing is changed.

    Args:
        model: the model to export.
        optimizers: one or several optimizers that train the model.

    Raises:
        ValueError: an optimizer has no parameter of this model, or no optimizer is given.
    """
    result = model.state_dict(keep_vars=True)
    state: dict[Any, Any] = {}
    entries = {value for value in result.values() if isinstance(value, torch.Tensor)}
    for i, optimizer in enumerate(map(own_optimizer, optimizers)):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if params and entries.isdisjoint(params):
            raise ValueError(f"optimizer {i} has no parameter of this model")
        state.update(optimizer.state)
    if not optimizers:
        raise ValueError("full_precision_state_dict needs the optimizer that trains the model")
    full: dict[torch.Tensor, torch.Tensor] = {}
    for name, value in result.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value not in full:
            held = state.get(value, {})
            wide = any(key in held for key in COMPANIONS)
            full[value] = full_weight(value, held) if wide else value.detach()
        result[name] = full[value]
    return result
