"""The formats: one file per format of states or of weights, with all that Python knows of it.

Every file of this folder with a ``FORMAT`` is a format; csrc/formats and triton_kernels/formats.py
have the same codes under the same number. docs/formats.md describes the codes, CONTRIBUTING.md how
to add a format.
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

ABSENT = -1  # in place of a format's number: the rule has no such state

# Written into every checkpoint. Add one when the codes of a format change, and set the format's
# readable_since. 2: mx4 has other codes. 3: those codes are int8 rather than uint8, so that dtypes
# tell every format.
VERSION = 3


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
"""By name, in the order of their numbers."""

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    form.name: form
    for form in sorted(
        (form for form in _FOUND if isinstance(form, WeightFormat)),
        key=lambda form: min(form.codes.values()),
    )
}
"""By name, in the order of their numbers."""

WEIGHT_FORMAT_OF_CODE: dict[int, WeightFormat] = {
    code: form for form in WEIGHT_FORMATS.values() for code in form.codes.values()
}

NATIVE: dict[torch.dtype, int] = WEIGHT_FORMATS["native"].codes
"""The numbers of weights and gradients as torch stores them, by dtype."""


def readable(version: int, states: str) -> bool:
    """Whether the codes in a checkpoint mean what they mean now.

    Args:
        version: the group's "format_version".
        states: the format of its states. A name that is unknown here counts as readable: the dtypes
            of the codes decide what they are.
    """
    since = STATE_FORMATS[states].readable_since if states in STATE_FORMATS else 1
    return version in range(since, VERSION + 1)


def scale_key(key: str) -> str:
    """The state key of the scales of a state."""
    return f"{key}_scale"
