"""The trainer's side: takes the weights that have changed since the last patch."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..distributed.shards import shards_of
from ..engine.change_record import ChangeRecord, Tracked
from ..engine.changed_weights import take_changes
from ..engine.numpy_codec import flat
from ..engine.plan_request import ParamView, PlainParam
from ..engine.tensor_access import (
    group_of,
    has_memory,
    has_own_operations,
    is_dtensor,
    share_memory,
    version_holder,
)
from ..engine.whole_positions import Place
from ..optim.base import own_optimizer
from .delta import Change, Delta
from .names import named_tensors, tied_names

_INT32 = 1 << 31


class _Member(NamedTuple):
    """A parameter of the model with its record."""

    name: str
    view: ParamView
    local: torch.Tensor  # of this rank, detached
    place: Place
    tracked: Tracked

    @property
    def wide(self) -> bool:
        """Whether positions need 64 bits."""
        return max(self.view.local.numel(), torch.Size(self.place.shape).numel()) > _INT32


def take_delta(model: torch.nn.Module, optimizer: Any, *, complete: bool = False) -> Delta:
    """The weights of a model that have changed since the last call, as a patch.

    The steps of the optimizer have recorded the changes (``track_changes=True``). Parameters that
    were written from outside, as their version counters say, are in the patch with all of their
    weights; so are parameters after the optimizer's state was loaded. Parameters that the optimizer
    does not have are compared by their version counters alone. Buffers are not in the patch.

    A parameter whose positions and values would take more bytes than all of its weights has the
    weights without positions. The record is cleared.

    The parameters of a sharded model (DTensors) give each rank a part of the patch, with positions
    in the whole parameter; every rank must call this function. The first call is then a collective.
    Replicated and ordinary parameters are in the part of the first rank that has them.

    Args:
        model: a module with parameters of the optimizer. It is only read.
        optimizer: an optimizer of onepass, or a wrapper of one.
        complete: make a patch with every weight, which a receiver accepts at any time.

    Returns:
        A patch on the devices of the parameters.

    Raises:
        ValueError: the optimizer does not track changes; no parameter of the model is tracked; a
            parameter has an unsupported placement or dtype, or shares memory with another; a
            parameter of an earlier patch is missing.
        RuntimeError: the weights are replaced by averages, or an earlier step failed halfway.
    """
    optimizer = own_optimizer(optimizer)
    record: ChangeRecord | None = optimizer.changes
    if record is None:
        raise ValueError("optimizer must be created with track_changes=True")
    optimizer.check_swapped()
    optimizer.check_failed()
    owned = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    named = named_tensors(model)
    _check_model(named, owned, record)
    record.keep({*named.values(), *owned})
    tied = tied_names(named)
    members = _members({n: p for n, p in named.items() if n not in tied}, record)
    for member in members if complete else ():
        member.tracked.whole = True
    part, ranks = _part_of(named.values())
    if not record.chain:
        record.chain = _agreed(uuid.uuid4().hex[:16], named.values())
    checksums = {}
    if not record.taken:
        # The sums of all parts are added: a parameter that is not sharded counts in one of them.
        checksums = {
            m.name: m.tracked.start
            for m in members
            if m.tracked.start is not None and _reports(m, part)
        }
    changes = _taken(members, part)
    last, current = record.next_patch(changes)
    sums = {name: value for name, value in checksums.items() if not changes[name].complete}
    return Delta(changes, current, last, sums, tied, frozenset((part,)), ranks)


def mark_changed(param: torch.Tensor) -> None:
    """Marks a parameter as changed throughout: the next patch has all of its weights.

    Call it after a write that does not move the version counter of the parameter: through
    ``.data``, NumPy, DLPack or a kernel of your own. The call moves the counter, as an in-place
    operation of torch does.

    Args:
        param: a parameter, which may be a DTensor.

    Raises:
        ValueError: the parameter is an inference tensor, which has no version counter. It is in
            every patch with all of its weights.
    """
    if param.is_inference():
        raise ValueError("param must not be an inference tensor: it has no version counter")
    holder = version_holder(param) if is_dtensor(param) else param
    torch.autograd.graph.increment_version([holder])


def _check_model(
    named: dict[str, torch.Tensor], owned: list[torch.Tensor], record: ChangeRecord
) -> None:
    """Raises ValueError if the model does not fit the optimizer or the last patch."""
    present = set(named.values())
    if not present.intersection(owned):
        raise ValueError("model must have a parameter of the optimizer; it has none")
    if any(is_dtensor(p) and p not in present for p in owned):
        raise ValueError(
            "the optimizer has a DTensor that is not in the model: the model is gathered for a "
            "forward pass (call model.reshard()), or it is a part of the trained model"
        )
    missing = sorted(record.names - named.keys())
    if missing:
        raise ValueError(
            f"the model has no parameter {missing[0]}, which earlier patches have: a chain of "
            "patches must keep its parameters"
        )
    plain = [p for p in present if not is_dtensor(p)]
    for name, param in named.items():
        if is_dtensor(param):
            continue
        if has_own_operations(type(param)) or not has_memory(param):
            raise ValueError(
                f"{name} must have its values in its own memory; it is a {type(param).__name__} on "
                f"{param.device}"
            )
    if share_memory(plain):
        raise ValueError(
            "two parameters of the model share memory without being one parameter, so a change of "
            "one cannot be seen in the other: tie them by assigning the same Parameter"
        )


def _members(named: dict[str, torch.Tensor], record: ChangeRecord) -> list[_Member]:
    """The parameters of the model with their records, compared with their version counters."""
    shards = shards_of(named.values())
    members = []
    for name, param in named.items():
        view: ParamView = shards.get(param) or PlainParam(param)
        try:
            local, place = view.local.detach(), view.place()
            members.append(_Member(name, view, local, place, record.of(param, view)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return members


def _part_of(params: Any) -> tuple[int, int]:
    """The number of this rank in the mesh of the model's DTensors, and the number of its ranks."""
    meshes = {p.device_mesh for p in params if is_dtensor(p)}
    if not meshes:
        return 0, 1
    if len(meshes) > 1:
        raise ValueError(f"the DTensors of the model must have one mesh; got {len(meshes)}")
    (mesh,) = meshes
    part = 0
    for i, at in enumerate(mesh.get_coordinate() or ()):
        part = part * mesh.size(i) + at
    return part, mesh.size()


def _agreed(value: str, params: Any) -> str:
    """The value of the first rank of the DTensors' mesh; collective if there is a mesh."""
    mesh = next((p.device_mesh for p in params if is_dtensor(p)), None)
    if mesh is None:
        return value
    found = [value]
    for i in range(mesh.ndim):
        if mesh.size(i) > 1:
            group = group_of(mesh, i)
            torch.distributed.broadcast_object_list(
                found, torch.distributed.get_global_rank(group, 0), group
            )
    return found[0]


def _taken(members: list[_Member], part: int) -> dict[str, Change]:
    """The change of each parameter; clears the records, or marks all parameters after an error."""
    try:
        changes = dict(_changes(members, part))
    except BaseException:
        for member in members:  # some records may be cleared already
            member.tracked.whole = True
        raise
    for member in members:
        member.tracked.clear()
    return changes


def _changes(members: list[_Member], part: int) -> Iterator[tuple[str, Change]]:
    """The change of each parameter, in the order of the members."""
    found: dict[str, Change] = {}
    lists: dict[Any, list[_Member]] = {}
    for member in members:
        if member.tracked.whole:
            if member.tracked.bits is not None:
                member.tracked.bits.zero_()
            found[member.name] = _throughout(member, part)
        elif member.tracked.bits is None:
            found[member.name] = _none(member)
        else:
            key = member.local.dtype, member.local.device, member.wide
            lists.setdefault(key, []).append(member)
    for (_, _, wide), some in lists.items():
        records = [m.tracked.bits for m in some if m.tracked.bits is not None]
        counts, positions, values = take_changes(records, [m.local for m in some], wide)
        sizes = counts.tolist()
        parts = torch.split(positions, sizes), torch.split(values, sizes)
        for member, at, new in zip(some, *parts, strict=True):
            found[member.name] = _some(member, part, at, new)
    return iter([(member.name, found[member.name]) for member in members])


def _reports(member: _Member, part: int) -> bool:
    """Whether this rank reports the parameter: one that is not sharded is in the first part."""
    return member.place.owned and (is_sharded(member) or part == 0)


def is_sharded(member: _Member) -> bool:
    """Whether the parameter is a DTensor."""
    return member.view.groups is not None


def _none(member: _Member) -> Change:
    """No change."""
    positions = torch.empty(0, dtype=torch.int32, device=member.local.device)
    return Change(member.place.shape, positions, member.local.new_empty(0))


def _throughout(member: _Member, part: int) -> Change:
    """All weights of this rank."""
    if not _reports(member, part):
        return _none(member)
    local, place = member.local, member.place
    if place.complete:
        return Change(place.shape, None, local.clone().reshape(-1))
    kind = torch.int64 if member.wide else torch.int32
    at = torch.arange(local.numel(), dtype=kind, device=local.device)
    return _sorted(member, at, flat(local).clone())


def _some(member: _Member, part: int, at: torch.Tensor, values: torch.Tensor) -> Change:
    """The change of recorded elements, at these indices in memory order."""
    if not _reports(member, part):
        return _none(member)
    size = values.element_size()
    if member.place.complete and len(at) * (at.element_size() + size) >= member.local.nbytes > 0:
        return _throughout(member, part)
    return _sorted(member, at, values)


def _sorted(member: _Member, at: torch.Tensor, values: torch.Tensor) -> Change:
    """The change of elements in memory order, in the order of positions."""
    positions = member.place.of(at)
    if positions is not at and not member.local.is_contiguous():
        positions, order = positions.sort()
        values = values[order]
    return Change(member.place.shape, positions, values)
