"""Optimizers by name or class, with the settings that a training run usually wants."""

from __future__ import annotations

from typing import Any

from .. import optim
from ..optim.registry import classes
from .validation import check_name

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    **classes(),
    "momentum": optim.SGD,
    "nesterov": optim.SGD,
}
"""Every class by its name in lower case, and SGD by two further names; see :func:`presets`."""


def optimizer_class(optimizer_type: str | type[optim.Optimizer]) -> type[optim.Optimizer]:
    """The class for a key of :data:`OPTIMIZERS`, or a subclass of onepass.Optimizer as it is.

    Raises:
        ValueError: an unknown name, which lists the known ones.
        TypeError: another class. Those of torch.optim lack max_grad_norm and skip_nonfinite; the
            message names onepass's class of the same name.
    """
    if isinstance(optimizer_type, type):
        if issubclass(optimizer_type, optim.Optimizer) and optimizer_type is not optim.Optimizer:
            return optimizer_type
        twin = OPTIMIZERS.get(optimizer_type.__name__.lower())
        hint = f": use onepass.{twin.__name__}" if twin is not None else ""
        raise TypeError(
            "optimizer_type must be a name or a subclass of onepass.Optimizer, which clips and "
            f"checks gradients in its step; got {optimizer_type.__module__}."
            f"{optimizer_type.__qualname__}{hint}"
        )
    check_name("optimizer_type", optimizer_type, OPTIMIZERS, "a class of onepass or ")
    return OPTIMIZERS[optimizer_type]


def presets(optimizer_type: str | type[optim.Optimizer]) -> dict[str, Any]:
    """Options that differ from the class's own defaults.

    AdamW's second moment is the shorter one of language models (Brown et al. 2020, GPT-3).
    """
    if issubclass(optimizer_class(optimizer_type), optim.AdamW):
        return {"betas": (0.9, 0.95)}
    if optimizer_type == "momentum":
        return {"momentum": 0.9}
    if optimizer_type == "nesterov":
        return {"momentum": 0.9, "nesterov": True}
    return {}


def make_optimizer(
    optimizer_type: str | type[optim.Optimizer], params: Any, lr: float, **options: Any
) -> optim.Optimizer:
    """The optimizer of that name or class.

    Args:
        optimizer_type: a key of :data:`OPTIMIZERS`: a class of onepass in lower case,
            ``"momentum"`` (SGD with momentum 0.9) or ``"nesterov"``; or a class: ``onepass.AdamW``.
            Formats are options: ``states="mx8"``.
        params: parameters or groups, as the classes take them.
        lr: learning rate.
        options: of the class; they override the presets, which are betas (0.9, 0.95) for AdamW.

    Raises:
        ValueError: an unknown name, which lists the known ones; an option out of range.
        TypeError: an option that the class does not have; a class that is not one of onepass's.
    """
    make = optimizer_class(optimizer_type)
    return make(params, **{"lr": lr, **presets(optimizer_type), **options})
