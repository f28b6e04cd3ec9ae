"""Parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optim.mixed_precision import NORMS, Selection, parameter_groups, select
from ..optim.muon import muon_groups
from ..rules.option_checks import check_number


def decay_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    no_decay: Selection = NORMS,
    fp32_states: Selection | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, with weight decay on weights but not on biases and norms.

    Three kinds of parameters are not decayed: all parameters of the modules that ``no_decay``
    selects; parameters with fewer than two dimensions (biases, and the scales of custom norms); and
    parameters that their module names ``bias``, ``bias_*`` or ``*_bias``.

    Args:
        model: the model. Parameters that require no gradient are left out. A tied parameter occurs
            once, and is not decayed if ``no_decay`` selects one of the modules that share it.
        weight_decay: the weight decay of the groups with decay.
        no_decay: module types (including subclasses) and names, like ``keep`` of
            :func:`onepass.cast_model`. To add to the default:
            ``(*onepass.NORMS, MyNorm, "head.scale")``.
        fp32_states: None, or the ``fp32_states`` argument of :func:`onepass.parameter_groups`; the
            groups of that function are then split by weight decay.

    Returns:
        Parameter groups in the form of torch.optim, those with decay first, without empty groups.
        Without ``fp32_states`` there are at most two groups, which torch.optim accepts too.

    Raises:
        ValueError: the model does not have a given name, no parameter requires a gradient, or the
            weight decay is not a number of at least 0.
    """
    check_number("weight_decay", weight_decay)
    _, selected = select(model, no_decay, "no_decay")
    plain = selected | {
        p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.ndim < 2 or _is_bias(name)
    }
    groups: list[dict[str, Any]]
    if fp32_states is None:
        groups = [{"params": list(model.parameters())}]
    else:
        groups = parameter_groups(model, fp32_states)
    split = []
    for decay in (True, False):
        for group in groups:
            params = [p for p in group["params"] if p.requires_grad and (p in plain) != decay]
            if params:
                value = weight_decay if decay else 0.0
                split.append({**group, "params": params, "weight_decay": value})
    if not split:
        count = sum(1 for _ in model.parameters())
        raise ValueError(
            f"the model needs a parameter that requires a gradient; none of its {count} does"
        )
    return split


def split_for_muon(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Splits groups by what :func:`onepass.muon_groups` selects for Muon and for AdamW.

    Args:
        model: the model of all parameters.
        groups: parameter groups; their options stay.

    Returns:
        Groups for :class:`onepass.Muon`, without empty ones.
    """
    split: list[dict[str, Any]] = []
    for kind in muon_groups(model):
        chosen = set(kind["params"])
        options: dict[str, Any] = {k: kind[k] for k in ("use_muon", "flatten") if k in kind}
        for group in groups:
            if params := [p for p in group["params"] if p in chosen]:
                split.append({**group, **options, "params": params})
    return split


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")
