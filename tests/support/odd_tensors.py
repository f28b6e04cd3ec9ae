"""Unusual gradients with ordinary values, settings around a step, and invalid inputs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Tensor = torch.Tensor
Undo = Callable[[], Any]

# --- gradients -------------------------------------------------------------------------------


class PlainSubclass(torch.Tensor):
    """A subclass that shares the storage of the tensor that it is made from."""


class Wrapper(torch.Tensor):
    """A tensor without its own storage, like the pending result of a collective.

    Operations on it return plain tensors.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls: type[Wrapper], inner: Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Unreadable(Wrapper):
    """A wrapper whose values cannot be read, like a DTensor without its process group."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # assigning a gradient detaches it
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} of an unreadable tensor")


def plain_value(tensor: Tensor) -> Tensor:
    """The values of any tensor as a new contiguous tensor."""
    if isinstance(tensor, TwoTensor):
        tensor = tensor.a
    with torch.no_grad():
        return torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _reversed(tensor: Tensor) -> Tensor:
    """Reverses the order of the dimensions in memory; a 4-d tensor becomes channels_last."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def _strided(tensor: Tensor) -> Tensor:
    """A view of every second element of a longer tensor."""
    gaps = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    gaps[..., 1] = tensor
    return gaps[..., 1]


def _offset(tensor: Tensor) -> Tensor:
    """A tensor that starts one element into its storage, so most vector loads are misaligned."""
    longer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    longer[1:] = tensor.reshape(-1)
    return longer[1:].view(tensor.shape)


def _first_everywhere(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:1].expand(tensor.numel()).reshape(tensor.shape)


def _expanded(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:1].clone().squeeze(0).expand(tensor.shape)


def _same(tensor: Tensor) -> Tensor:
    return tensor


# Representations of gradients -> (values of the gradient, tensor that has these values). Both are
# functions of an ordinary tensor.
GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reversed": (_same, _reversed),
    "strided": (_same, _strided),
    "offset": (_same, _offset),
    "expanded": (_first_everywhere, _expanded),
    "negative": (_same, lambda g: torch._neg_view(-g)),
    "zero_tensor": (torch.zeros_like, lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype)),
    "subclass": (_same, lambda g: g.as_subclass(PlainSubclass)),
    "parameter": (_same, lambda g: torch.nn.Parameter(g)),
    "non_leaf": (_same, lambda g: g.requires_grad_() * 1.0),
    "wrapper": (_same, Wrapper),
    "two_tensor": (_same, lambda g: TwoTensor(g, g.clone())),
}

# A step with these gradients may raise and must then change nothing: a TwoTensor consists of two
# tensors, and a zero tensor cannot be zeroed.
MAY_REFUSE = frozenset({"two_tensor", "zero_tensor"})

# --- settings --------------------------------------------------------------------------------


@contextmanager
def _set(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class _PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AMBIENT: dict[str, Callable[[], Any]] = {
    "default_bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default_float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default_meta": lambda: _set(torch.set_default_device, "meta", None),
    "device_meta": lambda: torch.device("meta"),
    "errstate": lambda: np.errstate(all="raise"),
    "warnings": _warnings_as_errors,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch_mode": _PassThrough,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "one_thread": lambda: _set(torch.set_num_threads, 1, torch.get_num_threads()),
}

# --- invalid inputs ---


def _resized(tensor: Tensor, factor: float) -> Undo | None:
    """Frees the storage of a tensor or its end.

    Returns:
        A function that restores the storage; None if the tensor has no bytes to free.
    """
    storage = tensor.untyped_storage()
    size, kept = storage.nbytes(), storage.clone()
    if not tensor.numel() or (factor and tensor.numel() < 2):
        return None
    if not storage.resizable():  # memory of a state allocator, which cannot be resized
        return None
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    storage.resize_(int(factor * end))

    def undo() -> None:
        storage.resize_(size)
        storage.copy_(kept)

    return undo


def _item(holder: Any, key: Any, value: Any) -> Undo:
    before = holder[key]
    holder[key] = value
    return lambda: holder.__setitem__(key, before)


def _gradient(param: Tensor, value: Tensor) -> Undo:
    before, dtype = param.grad, param.grad_dtype
    param.grad = None
    param.grad_dtype = None
    param.grad = value

    def undo() -> None:
        param.grad = None
        param.grad_dtype = dtype
        param.grad = before

    return undo


def _used_state(optimizer: Any, param: Tensor, group: dict[str, Any]) -> str | None:
    """The key of a state that the step of a parameter must read, or None."""
    state = optimizer.state.get(param, {})
    keys = ["exp_avg", "sum", "square_avg", *(["momentum_buffer"] if group.get("momentum") else [])]
    return next((key for key in keys if key in state), None)


def _state(change: Callable[[Any, str], Undo | None]) -> Any:
    def fault(optimizer: Any, param: Tensor, group: dict[str, Any], _: random.Random) -> Any:
        key = _used_state(optimizer, param, group)
        return None if key is None else change(optimizer.state[param], key)

    return fault


def _bad_counter(optimizer: Any, param: Tensor, _: Any, rng: random.Random) -> Undo | None:
    value = rng.choice((float("nan"), float("inf"), -1.0, [1.0, 2.0]))
    if "step" not in optimizer.state.get(param, {}):
        return None
    return _item(optimizer.state[param], "step", torch.tensor(value))


def _bad_option(_: Any, param: Tensor, group: dict[str, Any], rng: random.Random) -> Undo | None:
    bad = {"lr": ("x", -1.0, True), "betas": ((1.5, 0.9), 0.9), "weight_decay": (float("nan"),)}
    bad |= {"states": ("int3",), "weights": ("int3",), "seed": (-1, 0.5), "maximize": ("no",)}
    key = rng.choice([key for key in bad if key in group])
    return _item(group, key, rng.choice(bad[key]))


def _meta_parameter(_: Any, param: Tensor, *__: Any) -> Undo:
    other = torch.nn.Parameter(torch.empty_like(param, device="meta"))
    other.grad = torch.empty_like(other)
    torch.utils.swap_tensors(param, other)
    return lambda: torch.utils.swap_tensors(param, other)


def _of_gradient(change: Callable[[Tensor], Tensor]) -> Any:
    return lambda _, param, *__: _gradient(param, change(param.grad))


# name -> function of (optimizer, parameter with a gradient, its group, generator). It makes a fault
# and returns a function that undoes it, or None if the fault cannot be made.
FAULTS: dict[str, Callable[..., Undo | None]] = {
    "bad_option": _bad_option,
    "bad_counter": _bad_counter,
    "state_shape": _state(lambda held, key: _item(held, key, torch.zeros(held[key].numel() + 3))),
    "state_type": _state(lambda held, key: _item(held, key, "text")),
    "freed_gradient": lambda _, param, *__: _resized(param.grad, 0),
    "shrunk_gradient": lambda _, param, *__: _resized(param.grad, 0.5),
    "freed_parameter": lambda _, param, *__: _resized(param, 0),
    "shrunk_parameter": lambda _, param, *__: _resized(param, 0.5),
    "freed_state": _state(lambda held, key: _resized(held[key], 0)),
    "sparse_gradient": _of_gradient(lambda grad: grad.to_sparse()),
    "complex_gradient": _of_gradient(lambda grad: grad.to(torch.complex64)),
    "integer_gradient": _of_gradient(lambda grad: grad.to(torch.int32)),
    "unreadable_gradient": _of_gradient(Unreadable),
    "meta_parameter": _meta_parameter,
}
