"""onepass: optimizers for PyTorch whose step is a single pass over memory.

Names are imported at first use, so that ``onepass --help`` does not import torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import memory, optim
    from .checkpoints.bitsandbytes import from_bitsandbytes, to_bitsandbytes
    from .checkpoints.conversion import convert_state_dict, full_precision_state_dict
    from .distributed import number_parameters
    from .engine import backends
    from .engine import libraries as ops
    from .engine.rule_check import check_rule
    from .optim import *  # noqa: F403
    from .optim.custom import optimizer
    from .optim.grad_scaler import GradScaler
    from .optim.gradient_release import release_gradients
    from .optim.mixed_precision import EMBEDDINGS, NORMS, cast_model, parameter_groups
    from .optim.muon import muon_groups
    from .rules.custom import Rule
    from .weight_sync import (
        Delta,
        apply_delta,
        load_delta,
        mark_changed,
        merge_deltas,
        save_delta,
        take_delta,
    )

    __version__: str
    __all__ = [
        "EMBEDDINGS",
        "NORMS",
        "Delta",
        "GradScaler",
        "Rule",
        "apply_delta",
        "backends",
        "cast_model",
        "check_rule",
        "convert_state_dict",
        "from_bitsandbytes",
        "full_precision_state_dict",
        "load_delta",
        "mark_changed",
        "memory",
        "merge_deltas",
        "muon_groups",
        "number_parameters",
        "ops",
        "optimizer",
        "parameter_groups",
        "release_gradients",
        "save_delta",
        "take_delta",
        "to_bitsandbytes",
    ]
    __all__ += optim.__all__

_MODULES = {"backends": "engine.backends", "memory": "memory", "ops": "engine.libraries"}
_HOMES = {
    "from_bitsandbytes": "checkpoints.bitsandbytes",
    "to_bitsandbytes": "checkpoints.bitsandbytes",
    "convert_state_dict": "checkpoints.conversion",
    "full_precision_state_dict": "checkpoints.conversion",
    "number_parameters": "distributed",
    "GradScaler": "optim.grad_scaler",
    "Rule": "rules.custom",
    "check_rule": "engine.rule_check",
    "optimizer": "optim.custom",
    "release_gradients": "optim.gradient_release",
    "EMBEDDINGS": "optim.mixed_precision",
    "NORMS": "optim.mixed_precision",
    "cast_model": "optim.mixed_precision",
    "muon_groups": "optim.muon",
    "parameter_groups": "optim.mixed_precision",
    **dict.fromkeys(
        (
            "Delta",
            "apply_delta",
            "load_delta",
            "mark_changed",
            "merge_deltas",
            "save_delta",
            "take_delta",
        ),
        "weight_sync",
    ),
}
"""Name -> the module that has it; the optimizer classes are in ``optim``."""


def _version() -> str:
    """The version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onepass")
    except PackageNotFoundError:  # run from the sources, as bench/gpu.sh does
        return "0+source"


def _classes() -> Any:
    """The module with the optimizer classes."""
    return importlib.import_module(".optim", __name__)


def __getattr__(name: str) -> Any:
    """Imports a name at its first use (PEP 562)."""
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name == "__all__":
        value = sorted({*_HOMES, *_MODULES, *_classes().__all__})
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f".{name}", __name__)
    elif not name.startswith("_") and name in _classes().__all__:
        value = getattr(_classes(), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), "__version__"})
