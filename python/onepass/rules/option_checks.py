"""Checks of option values. Each raises a ValueError that names the option and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

_FP32_MAX = torch.finfo(torch.float32).max


def check_lr(lr: Any) -> None:
    """Raises ValueError unless lr is a number or one-element tensor in [0, the fp32 maximum].

    The value of a CUDA tensor is not read, because that would synchronize the host at every step.
    """
    if isinstance(lr, torch.Tensor) and lr.is_cuda and lr.numel() == 1 and not lr.is_complex():
        return
    if not is_number(lr) or not 0 <= float(lr) <= _FP32_MAX:
        raise ValueError(
            "lr must be a finite number >= 0 (or a 0-dim tensor with such a number); got "
            f"{_shown(lr)}"
        )


def check_number(name: str, value: Any, least: float = 0.0) -> None:
    """Raises ValueError unless value is a finite number of at least ``least``."""
    if not is_number(value) or not least <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= {least:g}; got {_shown(value)}")


def check_real(name: str, value: Any) -> None:
    """Raises ValueError unless value is a finite number."""
    if not is_number(value) or not math.isfinite(float(value)):
        raise ValueError(f"{name} must be a finite number; got {_shown(value)}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number in [0, 1)."""
    if not is_number(value) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1); got {_shown(value)}")


def check_betas(betas: Any, count: int = 2) -> None:
    """Raises ValueError unless betas are ``count`` numbers in [0, 1)."""
    for i, beta in enumerate(check_tuple("betas", betas, count)):
        check_fraction(f"betas[{i}]", beta)


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless value is True or False."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError unless value is a whole number of at least 0."""
    check_number(name, value)
    if float(value) != int(value):
        raise ValueError(f"{name} must be a whole number >= 0; got {value!r}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless value is one of the known names."""
    if value not in (names := list(known)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")


def check_seed(name: str, value: Any) -> None:
    """Raises ValueError unless value is an integer in [0, 2**63)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer in [0, 2**63); got {value!r}")


def check_tuple(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """Returns the values of a tuple or list; raises ValueError unless it has ``count`` values."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        needed = "a pair of numbers" if count == 2 else f"{count} numbers"
        raise ValueError(f"{name} must be {needed}; got {value!r}")
    return tuple(value)


def is_immutable(value: Any) -> bool:
    """Whether a value is None, a number, a string or a tuple of these, so that an object that was
    checked once needs no further check."""
    if type(value) is tuple:
        return all(map(is_immutable, value))
    return value is None or type(value) in (bool, int, float, str)


def is_number(value: Any) -> bool:
    """Whether a value is a number or a one-element tensor; strings and booleans are not."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return hasattr(value, "__float__") and not isinstance(value, (bool, np.bool_))


def _shown(value: Any) -> str:
    return str(float(value)) if is_number(value) else repr(value)
