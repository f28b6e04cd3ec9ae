"""Access to tensor data: memory, local tensors of DTensors, gradients of tensor subclasses.

``.grad`` may be any tensor: a subclass, the pending result of a collective, or a view with the
negative bit. Backends read memory directly, so such gradients are unwrapped, or copied with torch's
own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""The types whose data pointer is the address of their values."""


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all tensors are of :data:`PLAIN` types."""
    return PLAIN.issuperset(map(type, tensors))


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage has memory for all of its elements.

    False for a storage that was freed or shrunk (``resize_``), for tensors on the meta device, and
    for the wrappers of function arguments in torch.func.
    """
    if tensor.layout != torch.strided:
        return False
    if not tensor.numel():
        return True
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + span + 1) * tensor.element_size()
    try:
        return tensor.untyped_storage().nbytes() >= end and tensor.data_ptr() != 0
    except (NotImplementedError, RuntimeError):
        return False


def has_own_operations(kind: type[torch.Tensor]) -> bool:
    """Whether a tensor subclass overrides ``__torch_dispatch__``; its values may then be stored
    outside its own memory."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def dtensor_type() -> Any:
    """torch's DTensor class; None if torch.distributed.tensor is not imported, so that no DTensor
    can exist."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    """Whether a value is a DTensor."""
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def check_mesh(mesh: Any) -> None:
    """Raises ValueError if a device mesh does not have this rank."""
    if mesh.get_coordinate() is None:
        raise ValueError(
            "a parameter must not be distributed over a mesh without this rank; got "
            f"{mesh} on rank {torch.distributed.get_rank()}: create the optimizer with the "
            "parameters of this rank only"
        )


def group_of(mesh: Any, dim: int) -> Any:
    """The process group of this rank along a dimension of a device mesh; see :func:`check_mesh`."""
    check_mesh(mesh)
    return mesh.get_group(dim)


def waited(tensor: torch.Tensor) -> torch.Tensor:
    """Waits for the result of a functional collective; returns any other tensor unchanged."""
    kind: Any = getattr(
        sys.modules.get("torch.distributed._functional_collectives"), "AsyncCollectiveTensor", None
    )
    return tensor.wait() if kind is not None and isinstance(tensor, kind) else tensor  # type: ignore[attr-defined]


local_tensor = attrgetter("_local_tensor")
"""The local tensor of a DTensor, which may be the pending result of a collective.
DTensor.to_local() makes a new view at every call, which takes longer than the rest of a step."""


def local_of(value: Any) -> Any:
    """The local tensor of a DTensor, after a wait if it is pending; any other value unchanged."""
    return waited(local_tensor(value)) if is_dtensor(value) else value


def version_holder(whole: torch.Tensor) -> torch.Tensor:
    """A plain tensor that shares the version counter of a DTensor.

    Incrementing the counter through the plain tensor is faster: torch calls into the DTensor's
    Python code otherwise.
    """
    with torch.no_grad(), torch._C._DisableTorchDispatch():
        return torch.Tensor.detach(whole)


def unwrapped(grad: torch.Tensor, which: str) -> torch.Tensor:
    """Converts a gradient to a plain tensor with the same values.

    A plain tensor is returned unchanged. The function waits for a pending collective. A subclass
    that does not override torch's operations is viewed as a plain tensor; any other subclass is
    copied with its own ``copy_``.

    Args:
        grad: a dense gradient; it is only read.
        which: name of the parameter, for error messages.

    Raises:
        ValueError: the gradient is a DTensor, or a subclass that cannot be copied to a plain
            tensor.
    """
    grad = waited(grad)
    kind = type(grad)
    if kind in PLAIN:
        return grad
    if is_dtensor(grad):
        raise ValueError(
            f"{which} is not a DTensor, but its gradient is: convert it with grad.to_local()"
        )
    if not has_own_operations(kind) and not _overrides_functions(kind):
        with torch._C.DisableTorchFunctionSubclass():
            return grad.as_subclass(torch.Tensor)
    if not all(map(has_memory, _inner(grad))):
        raise ValueError(f"{which}: its gradient has no memory; it is a {kind.__name__}")
    try:
        plain = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        plain.copy_(grad)
    except Exception as error:  # a foreign subclass may raise any exception
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{which}: its gradient is a {kind.__name__}, which cannot be copied to a plain tensor "
            f"({type(error).__name__}: {first})"
        ) from error
    return plain


def _inner(grad: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a subclass; empty if the subclass does not expose them."""
    if not has_own_operations(type(grad)):
        with torch._C.DisableTorchFunctionSubclass():
            return [grad.as_subclass(torch.Tensor)]
    flatten = getattr(grad, "__tensor_flatten__", None)
    return [] if flatten is None else [getattr(grad, name) for name in flatten()[0]]


def _overrides_functions(kind: type[torch.Tensor]) -> bool:
    """Whether a subclass overrides ``__torch_function__``."""
    own: Any = kind.__torch_function__
    usual: Any = torch.Tensor.__torch_function__
    disabled = torch._C._disabled_torch_function_impl
    return own is not disabled and getattr(own, "__func__", own) is not usual.__func__


def share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the memory of any two dense tensors overlaps."""
    count = len(tensors)
    starts = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, count)
    sizes = np.fromiter(map(attrgetter("nbytes"), tensors), np.int64, count)
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    order = np.argsort(starts)
    ends = (starts + sizes)[order]
    return bool((starts[order][1:] < ends[:-1]).any())


def zero(grad: torch.Tensor) -> None:
    """Sets a gradient to zero, including an expanded gradient, which torch refuses to write."""
    if grad.layout == torch.strided and 0 in grad.stride():
        dims = zip(grad.shape, grad.stride(), strict=True)
        sizes = [size if stride else min(size, 1) for size, stride in dims]
        grad = grad.as_strided(sizes, grad.stride(), grad.storage_offset())
    grad.zero_()
