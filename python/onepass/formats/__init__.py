"""The formats: one file per state or weight format, with its whole Python definition.

Every file in this folder that defines ``FORMAT`` is a format. csrc/formats and
triton_kernels/formats.py implement the same codes under the same format numbers. docs/formats.md
describes the codes, and CONTRIBUTING.md describes how to add a format.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch

from .base import (
    Moment,
    StateFormat,
    Stored,
    WeightFormat,
    decode_states,
    decode_weight,
    encode_states,
    encode_weight,
)

__all__ = [
    "ABSENT",
    "NATIVE",
    "STATE_FORMATS",
    "VERSION",
    "WEIGHT_FORMATS",
    "WEIGHT_FORMAT_OF_CODE",
    "Moment",
    "StateFormat",
    "Stored",
    "WeightFormat",
    "decode_states",
    "decode_weight",
    "encode_states",
    "encode_weight",
    "readable",
    "scale_key",
]

ABSENT = -1  # used instead of a format number if the rule does not have the state

# Written into every checkpoint. If the codes of a format change, increment this number and set
# readable_since of the format. Version 2 changed the codes of mx4. Version 3 changed their dtype
# from uint8 to int8, so that the dtypes of codes and scales identify every format. Version 4
# changed no codes, but the random bits of stochastic weights: a run that was saved in version 3
# continues with other bits than in version 3.
VERSION = 4


def _found() -> list[StateFormat | WeightFormat]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f".{name}", __name__) for name in names]
    return [module.FORMAT for module in modules if hasattr(module, "FORMAT")]


_FOUND = _found()

STATE_FORMATS: dict[str, StateFormat] = {
    form.name: form
    for form in sorted(
        (form for form in _FOUND if isinstance(form, StateFormat)), key=lambda form: form.code
    )
}
"""The state formats by name, in the order of their numbers."""

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    form.name: form
    for form in sorted(
        (form for form in _FOUND if isinstance(form, WeightFormat)),
        key=lambda form: min(form.codes.values()),
    )
}
"""The weight formats by name, in the order of their numbers."""

WEIGHT_FORMAT_OF_CODE: dict[int, WeightFormat] = {
    code: form for form in WEIGHT_FORMATS.values() for code in form.codes.values()
}

NATIVE: dict[torch.dtype, int] = WEIGHT_FORMATS["native"].codes
"""The numbers of weights and gradients as torch stores them, by dtype."""


def readable(version: int, states: str) -> bool:
    """Whether this version decodes the state codes of a checkpoint correctly.

    Args:
        version: the "format_version" of the group in the checkpoint.
        states: the state format of the group. An unknown name counts as readable, because the
            dtypes of codes and scales identify the format.
    """
    since = STATE_FORMATS[states].readable_since if states in STATE_FORMATS else 1
    return version in range(since, VERSION + 1)


def scale_key(key: str) -> str:
    """The key in ``optimizer.state`` of the scales of a state."""
    return f"{key}_scale"
