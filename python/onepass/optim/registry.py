"""The optimizer classes by name, for commands and options that take a class name."""

from __future__ import annotations

from .. import optim
from .base import Optimizer


def classes() -> dict[str, type[Optimizer]]:
    """Every public optimizer class by its name in lower case: ``"adamw"``, ``"adamw8bit"``, ..."""
    found = {name.lower(): getattr(optim, name) for name in optim.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
