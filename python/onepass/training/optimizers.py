"""Optimizers by name or class, with common settings for training."""

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
"""Each class by its name in lower case, and two more names for SGD; see :func:`presets`."""


def optimizer_class(optimizer_type: str | type[optim.Optimizer]) -> type[optim.Optimizer]:
    """The class for a key of :data:`OPTIMIZERS`; a subclass of onepass.Optimizer is returned as is.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
        TypeError: the class is not a subclass of onepass.Optimizer. The classes of torch.optim lack
            max_grad_norm and skip_nonfinite; for these the message names the onepass class.
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
    """Options that replace the defaults of the class.

    AdamW has the smaller beta2 that is common for language models (Brown et al. 2020, GPT-3).
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
    """Makes an optimizer by name or class.

    Args:
        optimizer_type: a key of :data:`OPTIMIZERS`, which is the name of a onepass class in lower
            case, ``"momentum"`` (SGD with momentum 0.9) or ``"nesterov"``; or a class such as
            ``onepass.AdamW``.
        params: parameters or parameter groups.
        lr: the learning rate.
        options: keyword arguments of the class, such as ``states="mx8"``. They override the
            presets, which are betas (0.9, 0.95) for AdamW.

    Raises:
        ValueError: the name is unknown (the message lists the known names), or an option is out of
            range.
        TypeError: the class does not have one of the options, or is not a onepass class.
    """
    make = optimizer_class(optimizer_type)
    return make(params, **{"lr": lr, **presets(optimizer_type), **options})
