"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optim.mixed_precision import NORMS, Selection, parameter_groups, select
from ..rules.option_checks import check_number


def decay_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    no_decay: Selection = NORMS,
    fp32_states: Selection | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with decay on weights, and none on biases and norms; for any optimizer.

    Not decayed are the parameters of the modules that ``no_decay`` selects, whatever their name and
    shape; every parameter of fewer than two dimensions (biases, and the scales of norms that are no
    module of torch's); and those that their module calls ``bias``, ``bias_*`` or ``*_bias``.

    Args:
        model: parameters that require no gradient are left out; a tied one is in one group, once,
            and not decayed if one of the modules that share it is selected.
        weight_decay: of the first group.
        no_decay: types of modules (their subclasses too) and names, as ``keep`` of
            :func:`onepass.cast_model`; add your own: ``(*onepass.NORMS, MyNorm, "head.scale")``.
        fp32_states: None, or as that of :func:`onepass.parameter_groups`, whose groups are split
            here then.

    Returns:
        Groups as torch.optim takes them, those with decay first; empty ones are left out. Without
        ``fp32_states`` there are at most two, and torch's optimizers take them too.

    Raises:
        ValueError: a name that the model does not have; a model in which nothing requires a
            gradient; a weight decay that is not a number of at least 0.
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


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")
