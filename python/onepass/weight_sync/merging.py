"""Merges patches: consecutive ones, or the parts of several ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from .delta import Change, Delta


def merge_deltas(a: Delta, b: Delta) -> Delta:
    """One patch with the effect of two.

    The patches are either consecutive, b after a: a weight that both change gets b's value. Or they
    are the parts of one patch that two ranks took of a sharded model.

    Args:
        a, b: the patches; they are only read.

    Returns:
        A new patch. Of consecutive patches it has the predecessor of a and the id of b.

    Raises:
        ValueError: the patches are neither, or their parameters differ.
    """
    if a.id == b.id and a.predecessor == b.predecessor:
        return _joined(a, b)
    if b.predecessor != a.id:
        raise ValueError(
            f"b must follow a, or be another part of a: a is patch {a.id}, and b is patch {b.id} "
            f"after {b.predecessor or 'the start'}"
        )
    if a.parts != b.parts or a.ranks != b.ranks:
        raise ValueError(
            f"consecutive patches must have the same parts: a has {sorted(a.parts)} of {a.ranks}, "
            f"b has {sorted(b.parts)} of {b.ranks}. Merge the parts of each patch first"
        )
    changes = dict(a.changes)
    for name, change in b.changes.items():
        changes[name] = _followed(name, changes[name], change) if name in changes else change
    return replace(b, changes=changes, predecessor=a.predecessor, checksums=a.checksums)


def _joined(a: Delta, b: Delta) -> Delta:
    """The parts of one patch, together."""
    if a.ranks != b.ranks or a.parts & b.parts:
        raise ValueError(
            f"the parts of patch {a.id} must be of different ranks: a has {sorted(a.parts)} of "
            f"{a.ranks}, b has {sorted(b.parts)} of {b.ranks}"
        )
    changes, sums = dict(a.changes), dict(a.checksums)
    for name, change in b.changes.items():
        changes[name] = _followed(name, changes[name], change) if name in changes else change
    for name, value in b.checksums.items():
        sums[name] = (sums.get(name, 0) + value) % (1 << 64)
    sums = {name: value for name, value in sums.items() if not changes[name].complete}
    return replace(
        a, changes=changes, checksums=sums, tied={**a.tied, **b.tied}, parts=a.parts | b.parts
    )


def _followed(name: str, a: Change, b: Change) -> Change:
    """The change of a parameter by a and then b."""
    if b.positions is None:
        return b
    if a.shape != b.shape or a.values.dtype != b.values.dtype:
        if len(a.values) and not b.complete:
            raise ValueError(
                f"{name} is {a.values.dtype} of shape {a.shape} in one patch and "
                f"{b.values.dtype} of shape {b.shape} in the other"
            )
        return b
    theirs = b.positions.to(a.values.device)
    values = b.values.to(a.values.device)
    if a.positions is None:
        merged = a.values.clone()
        merged[theirs.long()] = values
        return replace(a, values=merged)
    kind = torch.promote_types(a.positions.dtype, theirs.dtype)
    at, order = torch.cat([a.positions.to(kind), theirs.to(kind)]).sort(stable=True)
    last = torch.ones_like(at, dtype=torch.bool)
    last[:-1] = at[1:] != at[:-1]  # of two equal positions b's is second
    return Change(a.shape, at[last], torch.cat([a.values, values])[order[last]])
