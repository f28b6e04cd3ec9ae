"""State dicts for elsewhere: other formats, and a model's weights in fp32."""

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
    """A state dict in other formats: of any of onepass's, or of torch.optim's twin.

    Loading converts to the optimizer's own formats by itself; this is for other readers.
    ``states="fp32", weights="native"`` makes what torch.optim loads.

    Args:
        optimizer: of the class, model and groups of the state dict; only read. Companions are of
            its weights as they are now: load the model's first.
        state_dict: only read.
        states: format of the states of all groups; None for that of each of the optimizer's groups.
        weights: format of all weights of 16 bits, likewise. ``"native"`` drops what companions
            hold: take :func:`full_precision_state_dict` too.

    Returns:
        A new state dict with tensors of its own. Values that a format does not have are rounded to
        nearest; fp32 takes the states of any other exactly.

    Raises:
        ValueError: as ``optimizer.load_state_dict``; an unknown format, or one that does not serve
            the dtype of a weight.
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
    # Without the hooks of the optimizer: they are for what is loaded into it.
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
    """``model.state_dict()`` with the fp32 weights that the optimizers work on.

    A weight with a companion (``kahan``, ``master``, ``split16``, ``split8``) is given as the
    float32 that both stand for, in the shape and strides of the weight. All other entries are what
    ``model.state_dict()`` has: they share memory with the model. Names of one shared parameter have
    one tensor. Nothing is changed.

    Args:
        model: whose weights are wanted.
        optimizers: those that train it, one or several.

    Raises:
        ValueError: an optimizer has no parameter of this model.
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
