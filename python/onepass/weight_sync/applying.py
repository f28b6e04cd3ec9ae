"""The receiver of patches: verifies that a patch follows, and writes it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..engine.tensor_access import has_memory, is_dtensor
from ..engine.weight_checksum import checksum, codes_of
from ..engine.whole_positions import whole_place
from .delta import Change, Delta
from .names import named_tensors


class _Receiver(NamedTuple):
    """What is known of the weights of a receiver.

    Attributes:
        id: the id of the last patch.
        versions: name -> address and version counter (None without one) after the last patch.
    """

    id: str
    versions: dict[str, tuple[int, int | None]]


_OF_MODULE: weakref.WeakKeyDictionary[torch.nn.Module, _Receiver] = weakref.WeakKeyDictionary()
_OF_TENSOR: Any = WeakIdKeyDictionary()
"""The receivers: modules, and state dicts by each of their tensors."""


def apply_delta(
    target: torch.nn.Module | Mapping[str, torch.Tensor], delta: Delta, *, after: str | None = None
) -> str:
    """Writes a patch into the weights of a server, in place.

    The first patch of a chain is verified by its checksums: the weights must have the bits that
    those of the trainer had when tracking started. A later patch must name the patch that was
    applied last. A patch with every weight is always accepted. Everything is checked before the
    first write.

    Args:
        target: a model or a state dict with whole tensors (no DTensors) on any device. A state dict
            is recognised by its tensor objects: keep them.
        delta: the patch. The parts of a sharded model must be merged first
            (:func:`onepass.merge_deltas`).
        after: the id of the patch that the weights are known to be at, for a target that this
            process has not patched before, or whose weights were replaced since by those of that
            patch. None (default) uses what this process knows.

    Returns:
        The id of the patch.

    Raises:
        ValueError: the patch does not follow the last one; parts of it are missing; or names,
            shapes, dtypes or checksums differ. The message names the parameter. Nothing is changed.
        RuntimeError: the weights were written since the last patch, as their version counters say.
    """
    named = named_tensors(target)
    if len(delta.parts) != delta.ranks:
        raise ValueError(
            f"patch {delta.id} has the parts of ranks {sorted(delta.parts)} of {delta.ranks}: "
            "merge the parts of all ranks (merge_deltas)"
        )
    pairs = _pairs(named, delta)
    if not delta.complete:
        _check_follows(target, pairs, delta, after)
    with torch.no_grad():
        for change, tensors in pairs.values():
            for tensor in tensors:
                _write(tensor, change)
    versions = {name: _version(tensors[0]) for name, (_, tensors) in pairs.items()}
    _remember(target, pairs, _Receiver(delta.id, versions))
    return delta.id


_Pairs = dict[str, tuple[Change, list[torch.Tensor]]]


def _pairs(named: Mapping[str, torch.Tensor], delta: Delta) -> _Pairs:
    """The change of each parameter with the tensors of its names.

    Raises:
        ValueError: a tensor is missing or does not fit.
    """
    found: _Pairs = {name: (change, []) for name, change in delta.changes.items()}
    for name in (*delta.changes, *delta.tied):
        if name in named:
            found[delta.tied.get(name, name)][1].append(named[name])
    for name, (change, tensors) in found.items():
        change.check(name)
        if not tensors:
            raise ValueError(f"the target has no tensor {name}, which the patch has")
        for tensor in tensors:
            if is_dtensor(tensor) or tensor.layout != torch.strided or not has_memory(tensor):
                raise ValueError(f"{name} of the target must be a whole tensor with memory")
            if tuple(tensor.shape) != change.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} in the target and {change.shape} in "
                    "the patch"
                )
            if tensor.dtype != change.values.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} in the target and {change.values.dtype} in the patch"
                )
    return found


def _check_follows(target: Any, pairs: _Pairs, delta: Delta, after: str | None) -> None:
    """Raises unless the weights are those that the patch was made for; see :func:`apply_delta`."""
    known = _known(target, pairs)
    at = after if after is not None else None if known is None else known.id
    if at is not None and at == delta.predecessor:
        if after is None and known is not None:
            _check_unwritten(pairs, known)
        return
    if delta.predecessor:
        last = "no patch was applied to these weights" if at is None else f"the last one was {at}"
        raise ValueError(
            f"patch {delta.id} follows patch {delta.predecessor}, but {last}: apply the patches "
            "that are missing, or one with every weight (docs/weight-sync.md)"
        )
    for name, (change, tensors) in pairs.items():
        if change.complete:
            continue
        for tensor in tensors:
            if checksum(tensor, whole_place(tensor)) != delta.checksums.get(name):
                raise ValueError(
                    f"{name} differs from the trainer's weights at the start of patch {delta.id}: "
                    "load the weights that the trainer started with, or apply a patch with every "
                    "weight (docs/weight-sync.md)"
                )


def _check_unwritten(pairs: _Pairs, known: _Receiver) -> None:
    """Raises RuntimeError if weights were written since the last patch."""
    for name, (change, tensors) in pairs.items():
        if not change.complete and known.versions.get(name) != _version(tensors[0]):
            raise RuntimeError(
                f"{name} was written after patch {known.id}, so the patch would be applied to "
                "other weights than the trainer's: restore the weights and pass after="
                f"{known.id!r}, or apply a patch with every weight"
            )


def _version(tensor: torch.Tensor) -> tuple[int, int | None]:
    """The address of a tensor, and its version counter if it has one."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _write(tensor: torch.Tensor, change: Change) -> None:
    """Writes the new weights of a parameter."""
    if not len(change.values):
        return
    context: Any = torch.inference_mode() if tensor.is_inference() else nullcontext()
    with context:
        codes = codes_of(tensor)
        values = codes_of(change.values).to(tensor.device)
        if change.positions is None:
            codes.copy_(values.view(change.shape))
            return
        at = change.positions.to(tensor.device, torch.int64)
        if codes.is_contiguous():
            codes.view(-1).index_copy_(0, at, values)
        elif codes.dim():
            codes[torch.unravel_index(at, change.shape)] = values


def _known(target: Any, pairs: _Pairs) -> _Receiver | None:
    """What is known of a target; None if that differs among the tensors of a state dict."""
    if isinstance(target, torch.nn.Module):
        return _OF_MODULE.get(target)
    some = [tensors[0] for change, tensors in pairs.values() if not change.complete]
    found = {id(known): known for known in map(_OF_TENSOR.get, some)}
    return found.popitem()[1] if len(found) == 1 else None


def _remember(target: Any, pairs: _Pairs, receiver: _Receiver) -> None:
    """Stores what is known of a target."""
    if isinstance(target, torch.nn.Module):
        _OF_MODULE[target] = receiver
        return
    for _, tensors in pairs.values():
        _OF_TENSOR[tensors[0]] = receiver
