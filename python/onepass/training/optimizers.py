"""Optimizers by name, with the settings that a training run usually wants."""

from __future__ import annotations

from typing import Any

from .. import optim
from .names import check_name

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    name.lower(): getattr(optim, name)
    for name in optim.__all__
    if name not in ("Optimizer", "Options")
}
"""Every class by its name in lower case: ``"adamw"``, ``"adamw8bit"``, ``"lion"``, ..."""
OPTIMIZERS.update(momentum=optim.SGD, nesterov=optim.SGD)


def presets(name: str) -> dict[str, Any]:
    """Options that differ from the class's own defaults.

    AdamW's second moment is the shorter one of language models (Brown et al. 2020, GPT-3).
    """
    if issubclass(OPTIMIZERS[name], optim.AdamW):
        return {"betas": (0.9, 0.95)}
    return {
        "momentum": {"momentum": 0.9},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    }.get(name, {})


def make_optimizer(name: str, params: Any, lr: float, **options: Any) -> optim.Optimizer:
    """The optimizer of that name.

    Args:
        name: a key of :data:`OPTIMIZERS`: a class of onepass in lower case, ``"momentum"`` (SGD
            with momentum 0.9) or ``"nesterov"``. Formats are options: ``states="mx8"``.
        params: parameters or groups, as the classes take them.
        lr: learning rate.
        options: of the class; they go before the presets, which are betas (0.9, 0.95) for AdamW.

    Raises:
        ValueError: an unknown name, which lists the known ones; an option out of range.
        TypeError: an option that the class does not have.
    """
    check_name("optimizer_type", name, OPTIMIZERS)
    return OPTIMIZERS[name](params, **{"lr": lr, **presets(name), **options})
