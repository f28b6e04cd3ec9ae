"""The scratch memory of the directions, and the batches in which they are orthogonalised."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .coefficients import lr_ratio, triples_of
from .matrices import Matrices
from .newton_schulz import Workspace, elements, orthogonalize
from .products import Products

_ALIGNMENT = 64
"""Elements to which the directions of one class are aligned: at least a cache line."""

_CPU_CHUNK = 1 << 20
"""Elements of one batch and its workspace on a CPU, so that small matrices stay in the cache."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The values of the option ``precision``."""


@dataclass(frozen=True)
class Settings:
    """The options of the products, which are those of the whole optimizer.

    Attributes:
        precision: a key of :data:`DTYPES`; None for bf16 on a GPU and fp32 elsewhere.
        scratch: the most bytes for the workspace of one batch. A single matrix may need more.
        products: the operations on batches.
    """

    precision: str | None
    scratch: int
    products: Products

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the directions and the products on a device."""
        if self.precision is None:
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return DTYPES[self.precision]

    def products_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the products: that of the directions, or fp32 where bf16 is slow.

        torch multiplies bf16 matrices one element at a time on a CPU without AVX-512, fifty times
        as slowly as fp32 matrices on AMD Zen 3.
        """
        slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
        return torch.float32 if slow else self.dtype(device)


class Direction(NamedTuple):
    """A parameter whose direction is orthogonalised.

    Attributes:
        matrices: how its memory is read.
        group: its group, whose options are read at every step.
        shape, stride: of the parameter's tensor on this rank.
    """

    matrices: Matrices
    group: Mapping[str, Any]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _Kind(NamedTuple):
    """Directions of one kind form batches: equal matrices of one group.

    Attributes:
        group: identity of the group.
        ratio: see :func:`lr_ratio`'s arguments: rows and columns.
        stored: the shape of each matrix as it is stored.
        strided: whether the matrices are not contiguous.
    """

    group: int
    ratio: tuple[int, int]
    stored: tuple[int, int]
    strided: bool


class Batch(NamedTuple):
    """Matrices that are orthogonalised together.

    Attributes:
        group: see :class:`Direction`.
        rows, cols: the shape of the matrices, for the learning rate.
        x: [n, rows, cols] as stored.
        space: scratch memory.
        copies: pairs of equal shape, one in the directions and one in x, which is copied to and
            back; empty if x is in the directions.
    """

    group: Mapping[str, Any]
    rows: int
    cols: int
    x: torch.Tensor
    space: Workspace
    copies: list[tuple[torch.Tensor, torch.Tensor]]

    def run(self, products: Products) -> None:
        """Orthogonalises the matrices in place."""
        group = self.group
        scale = lr_ratio(group["adjust_lr_fn"], self.rows, self.cols)
        for direction, copied in self.copies:
            copied.copy_(direction)
        orthogonalize(products, self.x, self.space, triples_of(group), float(group["eps"]), scale)
        for direction, copied in self.copies:
            direction.copy_(copied)


class Directions:
    """The directions of the parameters of one device.

    All memory is allocated here: nothing is allocated between momentum and weights.

    Args:
        found: the directions, in the order of entries.
        settings: the options of the products.
        device: the device of the memory.

    Attributes:
        tensors: the direction of each parameter, with its shape and strides.
        memory: the memory of the directions, and the workspace.
    """

    def __init__(
        self, found: Sequence[Direction], settings: Settings, device: torch.device
    ) -> None:
        self._products, dtype = settings.products, settings.dtype(device)
        kinds = _kinds_of(found)
        offsets, length = [0] * len(found), 0
        for members in kinds.values():
            length = -(-length // _ALIGNMENT) * _ALIGNMENT
            for i in members:
                offsets[i] = length
                length += found[i].numel
        memory = torch.zeros(length, dtype=dtype, device=device)
        self.tensors = [
            torch.as_strided(memory, one.shape, one.stride, offset)
            for one, offset in zip(found, offsets, strict=True)
        ]
        cuts = _cuts_of(found, kinds, settings, device)
        most = max((cut.elements for cut in cuts), default=0)
        work = torch.empty(most, dtype=settings.products_dtype(device), device=device)
        self.memory = [memory, work]
        self._batches: list[tuple[_Unit, list[Batch]]] = []
        for cut in cuts:
            for unit in cut.units:
                views = []
                if cut.kind.strided:
                    for i in unit.members:
                        views += found[i].matrices.views(memory[offsets[i] :])
                first = unit.members[0]
                begin, group = offsets[first], found[first].group
                self._batches.append((unit, cut.batches(unit, group, memory[begin:], views, work)))

    def batches_of(self, members: Collection[int]) -> list[Batch]:
        """The batches of some directions.

        Args:
            members: the indices of the directions, which consist of whole units (:func:`units_of`).
        """
        return [
            batch
            for unit, batches in self._batches
            if unit.members[0] in members
            for batch in batches
        ]

    def orthogonalize(self, batches: Sequence[Batch] | None = None) -> None:
        """Replaces each direction by the orthogonalised one times the ratio of learning rates.

        Args:
            batches: some of the batches; None for all of them.
        """
        if batches is None:
            batches = [batch for _, some in self._batches for batch in some]
        for batch in batches:
            batch.run(self._products)


def units_of(
    found: Sequence[Direction], settings: Settings, device: torch.device
) -> list[list[int]]:
    """The least sets of directions whose batches contain all of their matrices and no others.

    The result is equal on ranks with equal arguments, whatever their CPUs are.

    Returns:
        The indices of the directions of each set, in the order of the products.
    """
    cuts = _cuts_of(found, _kinds_of(found), settings, device)
    return [unit.members for cut in cuts for unit in cut.units]


def scratch_sizes(
    found: Sequence[Direction], settings: Settings, device: torch.device
) -> list[int]:
    """The bytes of each tensor of :attr:`Directions.memory`, without allocating them."""
    kinds, length = _kinds_of(found), 0
    for members in kinds.values():
        length = -(-length // _ALIGNMENT) * _ALIGNMENT + sum(found[i].numel for i in members)
    cuts = _cuts_of(found, kinds, settings, device)
    work = max((cut.elements for cut in cuts), default=0)
    sizes = (length, settings.dtype(device)), (work, settings.products_dtype(device))
    return [size * dtype.itemsize for size, dtype in sizes]


def _kinds_of(found: Sequence[Direction]) -> dict[_Kind, list[int]]:
    """The indices of the directions of each kind."""
    kinds: dict[_Kind, list[int]] = {}
    for i, one in enumerate(found):
        m = one.matrices
        kind = _Kind(id(one.group), (m.rows, m.cols), m.stored, m.order == "strided")
        kinds.setdefault(kind, []).append(i)
    return kinds


def _cuts_of(
    found: Sequence[Direction],
    kinds: Mapping[_Kind, Sequence[int]],
    settings: Settings,
    device: torch.device,
) -> list[_Cut]:
    """The division into batches of the directions of each kind."""
    dtype = widest = settings.dtype(device)
    limit = settings.scratch // dtype.itemsize
    if device.type == "cpu":
        # Some CPUs convert bf16 directions to fp32. The division must not depend on the CPU,
        # because all ranks of a process group must make the same one.
        widest = torch.float32
        limit = min(settings.scratch // widest.itemsize, _CPU_CHUNK)
    converts = dtype != settings.products_dtype(device)
    return [
        _Cut(
            kind,
            members,
            [found[i].matrices.count for i in members],
            limit,
            copied=kind.strided or converts,
            maybe_copied=kind.strided or dtype != widest,
        )
        for kind, members in kinds.items()
    ]


class _Unit(NamedTuple):
    """Directions of one kind whose batches contain all of their matrices and no others.

    Attributes:
        members: the indices of the directions.
        sizes: the number of matrices in each batch. There is one batch, or one direction, or the
            matrices have no elements and need no products.
    """

    members: list[int]
    sizes: list[int]


class _Cut:
    """The division of the matrices of one kind into batches.

    Args:
        kind: the kind.
        members: the indices of the directions.
        counts: the number of matrices of each direction.
        limit: the most elements of one workspace.
        copied: whether the products work on copies of the directions.
        maybe_copied: whether they do so on some CPU.

    Attributes:
        kind: as given.
        units: the directions in the order of members.
        elements: the elements of the workspace.
    """

    def __init__(
        self,
        kind: _Kind,
        members: Sequence[int],
        counts: Sequence[int],
        limit: int,
        *,
        copied: bool,
        maybe_copied: bool,
    ) -> None:
        self.kind, self._copied = kind, copied
        rows, cols = kind.stored
        each = elements(rows, cols)
        most = max(1, limit // (each + (rows * cols if maybe_copied else 0)))
        if not rows * cols:
            counts = [0] * len(members)
        self.units = _units(members, counts, most)
        largest = max((size for unit in self.units for size in unit.sizes), default=0)
        self.elements = largest * (each + (rows * cols if copied else 0))

    def batches(
        self,
        unit: _Unit,
        group: Mapping[str, Any],
        memory: torch.Tensor,
        views: list[torch.Tensor],
        work: torch.Tensor,
    ) -> list[Batch]:
        """The batches of a unit.

        Args:
            unit: one of the units.
            group: the group of the parameters.
            memory: the directions of this unit, from the first one on.
            views: the matrices in memory if they are strided.
            work: the memory of the workspace.
        """
        (rows, cols), made, begin = self.kind.stored, [], 0
        m = min(rows, cols)
        for n in unit.sizes:
            sizes = [(rows, cols), (m, m), (m, m), (1, 1), (1, 1)]
            if self._copied:
                sizes.append((rows, cols))
            parts, at = [], 0
            for size in sizes:
                numel = n * math.prod(size)
                parts.append(work[at : at + numel].view(n, *size))
                at += numel
            start = begin * rows * cols
            whole = memory[start : start + n * rows * cols].view(n, rows, cols)
            x = parts.pop() if self._copied else whole
            copies = [(whole, x)] if self._copied else []
            if self.kind.strided:
                pairs = zip(views[begin : begin + n], x, strict=True)
                copies = [(view, one.view(view.shape)) for view, one in pairs]
            made.append(Batch(group, *self.kind.ratio, x, Workspace(*parts), copies))
            begin += n
        return made


def _units(members: Sequence[int], counts: Sequence[int], most: int) -> list[_Unit]:
    """Divides directions into units with batches of nearly equal size.

    A batch consists of whole directions, so that directions can be exchanged between ranks one
    batch after the other. A direction with too many matrices has several batches of its own.

    Args:
        members: the indices of the directions.
        counts: the number of matrices of each direction.
        most: the most matrices of one batch.
    """
    target, held = _even(sum(counts), most), 0
    listed: list[tuple[list[int], list[int]]] = []  # members and counts of each unit
    for i, count in zip(members, counts, strict=True):
        if not listed or held + count > target:
            listed.append(([], []))
            held = 0
        listed[-1][0].append(i)
        listed[-1][1].append(count)
        held += count
    units = []
    for some, numbers in listed:
        total = sum(numbers)
        size = _even(total, most)
        units.append(_Unit(some, [min(size, total - at) for at in range(0, total, size or 1)]))
    return units


def _even(count: int, most: int) -> int:
    """The size of the fewest parts of nearly equal size with at most this many elements."""
    parts = max(1, -(-count // most))
    return -(-count // parts)
