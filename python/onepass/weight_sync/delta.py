"""The patch of one synchronisation: the changed weights of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Change:
    """The changed weights of one parameter.

    Attributes:
        shape: shape of the whole parameter.
        positions: int32 or int64 [n], sorted indices into the flattened parameter; None if the
            values are all weights of the parameter.
        values: the new weights [n], in the parameter's dtype.
    """

    shape: tuple[int, ...]
    positions: torch.Tensor | None
    values: torch.Tensor

    @property
    def numel(self) -> int:
        """Number of weights of the whole parameter."""
        return math.prod(self.shape)

    @property
    def complete(self) -> bool:
        """Whether every weight of the parameter has a new value."""
        return len(self.values) == self.numel

    @property
    def nbytes(self) -> int:
        """Size of positions and values in bytes."""
        return self.values.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def check(self, name: str) -> None:
        """Raises ValueError if the positions do not fit the values or the parameter."""
        count, at = len(self.values), self.positions
        if at is None:
            if count != self.numel:
                raise ValueError(f"delta of {name}: {count} values for {self.numel} weights")
            return
        if at.dtype not in (torch.int32, torch.int64) or at.shape != self.values.shape:
            raise ValueError(
                f"delta of {name}: positions must be {count} integers; got {at.dtype} of shape "
                f"{tuple(at.shape)}"
            )
        inside = not count or (int(at[0]) >= 0 and int(at[-1]) < self.numel)
        if not inside or not bool((at[1:] > at[:-1]).all()):
            raise ValueError(
                f"delta of {name}: positions must be sorted, different and in [0, {self.numel})"
            )


@dataclass(frozen=True)
class Delta:
    """A patch: the weights that changed since the patch before.

    Attributes:
        changes: the changed weights of every parameter by name, also of those without a change.
        id: the id of this patch, which its successor names.
        predecessor: the id of the patch before; empty in the first patch of a chain.
        checksums: only in the first patch: name -> checksum of the weights *before* the patch, of
            the parameters that are not complete in it.
        tied: second name of a parameter that has several -> its name in ``changes``.
        parts: the ranks whose shards the patch has.
        ranks: the number of ranks over which the model is sharded; 1 if it is not.
    """

    changes: Mapping[str, Change]
    id: str
    predecessor: str
    checksums: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    parts: frozenset[int] = frozenset((0,))
    ranks: int = 1

    @property
    def complete(self) -> bool:
        """Whether the patch has every weight, so that it can be applied to any weights."""
        return all(change.complete for change in self.changes.values())

    @property
    def numel(self) -> int:
        """Number of changed weights."""
        return sum(len(change.values) for change in self.changes.values())

    @property
    def nbytes(self) -> int:
        """Size of all positions and values in bytes."""
        return sum(change.nbytes for change in self.changes.values())

    def __repr__(self) -> str:
        whole = sum(change.numel for change in self.changes.values())
        return (
            f"Delta({self.id} after {self.predecessor or 'the start'}: {self.numel} of {whole} "
            f"weights, {self.nbytes} bytes, parts {sorted(self.parts)} of {self.ranks})"
        )
