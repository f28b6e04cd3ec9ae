"""Reading gradients in the compiled libraries, from Python's own objects (csrc/reader.h).

An op that takes a list of tensors costs torch more for each of them than all that a plan checks.
torch.Tensor describes itself to C by DLPack's exchange API, and CPython's stable ABI walks the
list. What would take them long, the gradient of a DTensor and its local tensor, is read where an
object, of Python's or of torch's own, has its address. That place is found by looking for a known
address in one object of the type; where it is not there once, the list serves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any

import torch

from . import ops

_OBJECT = ctypes.py_object
_GRAD = "grad"


def _fields(kind: type, *names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names)


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1, as far as it is used."""

    _fields_ = (
        *_fields(ctypes.c_uint32, "major", "minor"),
        *_fields(ctypes.c_void_p, "older", "allocate", "export", "wrap", "view"),
    )


class _Python(ctypes.Structure):
    """Python of csrc/reader.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "item", "attribute", "release", "view", "none", "grad"),
        *_fields(ctypes.c_ssize_t, "type", "impl", "meta", "object", "meta_grad"),
    )


class _Slots(ctypes.Structure):
    """Slots of csrc/reader.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "type"),
        *_fields(ctypes.c_ssize_t, "local", "spec"),
    )


_LINE = 64  # bytes; what a tensor stands for and its autograd metadata are longer


def _words(start: int, size: int = _LINE) -> dict[int, int]:
    """Memory in words, by where they are from its start, in bytes."""
    places = range(0, size, ctypes.sizeof(ctypes.c_void_p))
    return {at: ctypes.c_void_p.from_address(start + at).value or 0 for at in places}


def _only(places: Iterable[int]) -> int | None:
    found = list(places)
    return found[0] if len(found) == 1 else None


def _place(owner: Any, address: int) -> int | None:
    """Where an object has an address, in bytes from its own; None where it is not there once. All
    objects of its type have it there."""
    words = _words(id(owner), type(owner).__basicsize__)
    return _only(at for at, word in words.items() if word == address)


def _with_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    tensor, grad = torch.nn.Parameter(torch.empty(1)), torch.empty(1)
    tensor.grad = grad
    return tensor, grad


@cache
def _chain() -> tuple[int, int, int]:
    """Where a tensor's gradient is found: _Python's meta, object and meta_grad; zeros where they
    cannot be told.

    A tensor that has a gradient has autograd metadata, what its data gives has none. The places
    found in one tensor must lead to the gradient of another."""
    unknown = 0, 0, 0
    (tensor, grad), (other, its_grad) = _with_gradient(), _with_gradient()
    bare = tensor.data
    impl, without = _words(tensor._cdata), _words(bare._cdata)
    meta = _only(at for at, word in impl.items() if word and not without[at])
    object = _only(at for at, word in impl.items() if word & ~1 == id(tensor))
    if meta is None or object is None:
        return unknown
    words = _words(impl[meta])
    meta_grad = _only(at for at, word in words.items() if word == grad._cdata)
    if meta_grad is None:
        return unknown
    address = other._cdata
    for at in (meta, meta_grad, object):
        address = _words(address)[at] if address else 0
    return (meta, object, meta_grad) if address & ~1 == id(its_grad) else unknown


@cache
def _python() -> _Python | None:
    """What the libraries need; None where torch or Python has it not."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    api = getattr(ctypes, "pythonapi", None)
    if capsule is None or api is None:
        return None
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    at = pointer(("PyCapsule_GetPointer", api))(capsule, b"dlpack_exchange_api")
    exchange = _Exchange.from_address(at)
    tensor = torch.empty(0)
    places = [_place(tensor, address) for address in (id(type(tensor)), tensor._cdata)]
    if exchange.major != 1 or not exchange.view or None in places:
        return None
    functions = (api.PyList_GetItem, api.PyObject_GetAttr, api.Py_DecRef)
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return _Python(*addresses, exchange.view, id(None), id(_GRAD), *places, *_chain())


def _slots(tensors: list[Any]) -> _Slots | None:
    """Where DTensors, all of one type, have their local tensors and specs; None where that or the
    way to their gradients cannot be told."""
    first = tensors[0]
    kind = type(first)
    places = [_place(first, id(getattr(first, name))) for name in ("_local_tensor", "_spec")]
    if None in places or any(type(tensor) is not kind for tensor in tensors):
        return None
    if not all(_chain()) or kind.grad is not torch.Tensor.grad:
        return None
    return _Slots(id(kind), *places)


@cache
def _function(library: Path, name: str, *types: Any) -> Any:
    """A function of a library, which torch has loaded."""
    function = getattr(ctypes.PyDLL(str(library)), name)
    function.argtypes = (ctypes.c_void_p, *types)
    return function


def same_lists(found: list[Any], known: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    if len(found) != len(known):
        return False
    python = None if ops.missing else _python()
    if python is None or not isinstance(found, list):
        return all(map(is_, found, known))
    same = _function(ops.LIBRARY, "onepass_same", _OBJECT, _OBJECT, ctypes.c_ssize_t)
    return bool(same(ctypes.addressof(python), found, known, len(known)))


class GradientReader:
    """Takes the gradients of a plan; false where it cannot.

    Args:
        library: that made the plan.
        plan: its handle, a tensor.
    """

    def __init__(self, library: Path, plan: torch.Tensor) -> None:
        python = _python()
        self._usable = python is not None
        self._slots: _Slots | None = None
        self._known: list[torch.Tensor] | None = None
        if python is not None:
            types = ctypes.c_void_p, ctypes.POINTER(_Slots), *[_OBJECT] * 3
            self._read = _function(library, "onepass_read", *types)
            self._plan = ctypes.addressof(python), plan.data_ptr()

    def __call__(
        self,
        tensors: list[torch.Tensor],
        locals: list[torch.Tensor] | None,
        specs: list[Any] | None,
    ) -> bool:
        """See :meth:`onepass.backends.base.Backend.read`."""
        if not self._usable:
            return False
        if locals is not None and tensors is not self._known:
            self._known, self._slots = tensors, _slots(tensors)
        try:
            return bool(self._read(*self._plan, self._slots, tensors, locals, specs))
        except Exception:
            # A gradient without an address, sparse for one: planning anew says which.
            return False
