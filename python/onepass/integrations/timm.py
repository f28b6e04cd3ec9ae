"""onepass's optimizers in timm's registry. Importing this module imports timm."""

from __future__ import annotations

import inspect

from ..optim.registry import classes
from .frameworks import import_framework

_factory = import_framework("timm.optim._optim_factory", package="timm")
_NAME = "onepass-{}"


def register() -> list[str]:
    """Makes every optimizer class known to timm by its name in lower case after ``onepass-``.

    ``create_optimizer_v2(model, opt="onepass-adamw8bit")`` and ``--opt onepass-adamw8bit`` of
    timm's training script then create a onepass.AdamW8bit. The names have a hyphen because timm
    looks up only what follows the last underscore. Other keywords of the class are passed
    to ``create_optimizer_v2``, or as ``--opt-kwargs states=mx8`` to the script. Changes timm's
    registry of this process; it can be called again.

    Returns:
        The names, sorted.
    """
    for name, kind in classes().items():
        known = inspect.signature(kind).parameters
        info = _factory.OptimInfo(
            name=_NAME.format(name),
            opt_class=kind,
            description=f"{kind.__name__} of onepass",
            has_eps="eps" in known,
            has_momentum="momentum" in known,
            has_betas="betas" in known,
            num_betas=len(known["betas"].default) if "betas" in known else 0,
        )
        # register() of the registry logs a warning for each name that it replaces.
        _factory.default_registry._optimizers.pop(info.name, None)
        _factory.default_registry.register(info)
    return sorted(_NAME.format(name) for name in classes())
