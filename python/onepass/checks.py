"""The checks of options, parameters and gradients; each raises before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .formats import NATIVE, WEIGHT_FORMATS
from .gradients import has_memory, has_own_operations

_FP32_MAX = torch.finfo(torch.float32).max


def check_lr(lr: Any) -> None:
    """Raises ValueError unless lr is a number, or a tensor of one, in [0, fp32's largest].

    The value of a tensor on a GPU is not read: the host would wait for it at every step.
    """
    if isinstance(lr, torch.Tensor) and lr.is_cuda and lr.numel() == 1 and not lr.is_complex():
        return
    if not _is_number(lr) or not 0 <= float(lr) <= _FP32_MAX:
        raise ValueError(
            f"lr must be a finite number >= 0 (or a 0-dim tensor of one); got {_shown(lr)}"
        )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_memory(tensor: torch.Tensor, which: str) -> None:
    """Raises ValueError unless a tensor has memory, or would have it if it had elements."""
    if tensor.device.type == "meta" or not has_memory(tensor):
        raise ValueError(
            f"{which} has no memory for its {tensor.numel()} elements: its storage was freed or "
            "shrunk, or never had any"
        )


def check_distinct(tensors: Iterable[tuple[torch.Tensor, str]]) -> None:
    """Raises ValueError where two tensors that one step writes share memory: the result would
    depend on which of them is written first.

    Args:
        tensors: dense tensors of one device, each with the name of its parameter.
    """
    listed = [(t, name) for t, name in tensors if t.numel()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, (t, _) in enumerate(listed))
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            first, second = sorted((listed[i][1], listed[j][1]))
            raise ValueError(
                f"{first} and {second} share memory: one parameter listed twice, or two tensors on "
                "one storage, cannot be written by one step"
            )


def check_tensors(param: torch.Tensor, grad: torch.Tensor, which: str) -> None:
    """Raises unless a rule can work on the parameter and its gradient."""
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"onepass does not support sparse gradients: {which} has one with layout "
            f"{grad.layout}; use a dense gradient (for embeddings: sparse=False)"
        )
    check_param(param, which)
    if has_own_operations(type(param)):
        raise ValueError(
            f"{which} is a {type(param).__name__}, a tensor subclass with operations of its own: "
            "onepass steps plain tensors and DTensors"
        )
    if grad.dtype not in NATIVE:
        raise ValueError(f"{which}: its gradient must be {_dtypes()}; got {grad.dtype}")
    if grad.shape != param.shape:
        raise ValueError(f"{which}: its gradient has another shape, {tuple(grad.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{which} is on {param.device}, its gradient on {grad.device}")
    check_dense(param, which)
    check_memory(param, which)
    check_memory(grad, f"{which}: its gradient")


def check_dense(param: torch.Tensor, which: str) -> None:
    """Raises ValueError where the strides of a parameter leave gaps or overlap."""
    if not is_dense(param):
        raise ValueError(
            f"{which}: its strides {param.stride()} leave gaps or overlap; onepass walks memory in "
            "order: make it dense, for example with .contiguous()"
        )


def check_param(param: torch.Tensor, which: str) -> None:
    """Raises ValueError unless the parameter's dtype is one that rules work on."""
    if param.is_complex():
        raise ValueError(
            f"{which} is complex ({param.dtype}): onepass has no rule for complex numbers; "
            "use torch.view_as_real(param)"
        )
    if param.dtype not in NATIVE:
        raise ValueError(f"{which} must be {_dtypes()}; got {param.dtype}")


def check_weight_format(param: torch.Tensor, weights: str, which: str) -> None:
    """Raises ValueError unless the weight format serves the parameter's dtype."""
    served = WEIGHT_FORMATS[weights].codes
    if param.dtype not in served:
        known = [name for name, form in WEIGHT_FORMATS.items() if param.dtype in form.codes]
        helper = ""
        if param.dtype == torch.float32:
            helper = " (onepass.parameter_groups makes such groups)"
        raise ValueError(
            f"weights={weights!r} is for {_dtypes(served)} weights; {which} is {param.dtype}: give "
            f"it a group with weights={' or '.join(map(repr, known))}{helper}"
        )


def _dtypes(dtypes: Iterable[torch.dtype] = NATIVE) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_number(name: str, value: Any, least: float = 0.0) -> None:
    """Raises ValueError unless value is a finite number of at least ``least``."""
    if not _is_number(value) or not least <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= {least:g}; got {_shown(value)}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number in [0, 1)."""
    if not _is_number(value) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1); got {_shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless value is True or False."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless value is one of the known names."""
    if value not in (names := list(known)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """The two values of a pair; raises ValueError for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers; got {value!r}")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    """Whether a value is a number or a tensor of one; neither a word nor a truth value is."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return hasattr(value, "__float__") and not isinstance(value, (bool, np.bool_))


def _shown(value: Any) -> str:
    return str(float(value)) if _is_number(value) else repr(value)
