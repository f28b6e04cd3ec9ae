"""Checks of parameters and gradients, which raise before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

from ..formats import NATIVE, WEIGHT_FORMATS
from .tensor_access import has_memory, has_own_operations


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one memory range without gaps or overlap, in any order."""
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
    """Raises ValueError if a tensor is on the meta device or has no memory for its elements."""
    if tensor.device.type == "meta" or not has_memory(tensor):
        raise ValueError(
            f"{which} has no memory for its {tensor.numel()} elements: its storage was freed, "
            "resized or never allocated"
        )


def check_distinct(tensors: Iterable[tuple[torch.Tensor, str]]) -> None:
    """Checks that no two tensors that one step writes share memory.

    With shared memory, the result would depend on the order of the writes.

    Args:
        tensors: dense tensors on one device, each with the name of its parameter.

    Raises:
        ValueError: two tensors share memory.
    """
    listed = [(t, name) for t, name in tensors if t.numel()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, (t, _) in enumerate(listed))
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            first, second = sorted((listed[i][1], listed[j][1]))
            raise ValueError(
                f"{first} and {second} share memory: a step cannot update a parameter that is "
                "listed twice, or two tensors with overlapping memory"
            )


def check_tensors(param: torch.Tensor, grad: torch.Tensor, which: str) -> None:
    """Checks that a parameter and its gradient are supported.

    Args:
        param, grad: plain tensors.
        which: name of the parameter, for error messages.

    Raises:
        RuntimeError: the gradient is sparse.
        ValueError: any other property of either tensor is not supported.
    """
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"onepass does not support sparse gradients: {which} has one with layout "
            f"{grad.layout}; use a dense gradient (for embeddings: sparse=False)"
        )
    check_param(param, which)
    if has_own_operations(type(param)):
        raise ValueError(
            f"{which} is a {type(param).__name__}, a tensor subclass with its own operations; "
            "onepass supports plain tensors and DTensors"
        )
    if grad.dtype not in NATIVE:
        raise ValueError(f"{which}: its gradient must be {_dtypes()}; got {grad.dtype}")
    if grad.shape != param.shape:
        raise ValueError(
            f"{which}: its gradient has another shape than the parameter, {tuple(grad.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"{which} is on {param.device}, its gradient on {grad.device}")
    check_dense(param, which)
    check_memory(param, which)
    check_memory(grad, f"{which}: its gradient")


def check_dense(param: torch.Tensor, which: str) -> None:
    """Raises ValueError if the strides of a parameter leave gaps or overlap."""
    if not is_dense(param):
        raise ValueError(
            f"{which}: its strides {param.stride()} leave gaps or overlap; onepass needs dense "
            "memory: make the tensor dense, for example with .contiguous()"
        )


def check_param(param: torch.Tensor, which: str) -> None:
    """Raises ValueError if the parameter's dtype is not supported."""
    if param.is_complex():
        raise ValueError(
            f"{which} is complex ({param.dtype}); onepass does not support complex numbers: use "
            "torch.view_as_real(param)"
        )
    if param.dtype not in NATIVE:
        raise ValueError(f"{which} must be {_dtypes()}; got {param.dtype}")


def check_weight_format(param: torch.Tensor, weights: str, which: str) -> None:
    """Raises ValueError if the weight format does not support the parameter's dtype."""
    served = WEIGHT_FORMATS[weights].codes
    if param.dtype not in served:
        known = [name for name, form in WEIGHT_FORMATS.items() if param.dtype in form.codes]
        helper = ""
        if param.dtype == torch.float32:
            helper = " (onepass.parameter_groups makes such groups)"
        raise ValueError(
            f"weights={weights!r} is for {_dtypes(served)} weights; {which} is {param.dtype}: put "
            f"it in a group with weights={' or '.join(map(repr, known))}{helper}"
        )


def _dtypes(dtypes: Iterable[torch.dtype] = NATIVE) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
