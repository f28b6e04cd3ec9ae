"""How the memory of a parameter is read as a batch of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..engine.validation import is_dense


class _Dim(NamedTuple):
    """A dimension of a tensor."""

    size: int
    stride: int


@dataclass(frozen=True)
class Matrices:
    """A batch of matrices in the memory of a dense tensor.

    Attributes:
        rows, cols: the shape of each matrix.
        shape, stride: the tensor as (batch dimensions, row dimensions, column dimensions).
        batch: the number of batch dimensions.
        order: "rows" if the matrices are contiguous in memory, "columns" if their transposes are,
            and "strided" otherwise.
    """

    rows: int
    cols: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    batch: int
    order: str

    @property
    def count(self) -> int:
        """The number of matrices."""
        return math.prod(self.shape[: self.batch])

    @property
    def stored(self) -> tuple[int, int]:
        """The shape of each matrix as the products read it.

        Orthogonalisation and transposition commute, so a matrix that is transposed in memory is
        orthogonalised as it is stored.
        """
        return (self.cols, self.rows) if self.order == "columns" else (self.rows, self.cols)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """A view of each matrix, with its row and column dimensions.

        Args:
            memory: the first element of the tensor and all that follow, 1-dimensional.
        """
        found = [torch.as_strided(memory, self.shape, self.stride, memory.storage_offset())]
        for _ in range(self.batch):
            found = [part for one in found for part in one.unbind()]
        return found


def matrices_of(param: torch.Tensor, group: Mapping[str, Any], which: str) -> Matrices:
    """The matrices of a parameter.

    A tensor [M, N] is one matrix. ``flatten`` selects between a batch of matrices [..., M, N] and
    one matrix [out, rest]; by default, three dimensions are a batch, and more are a convolution.
    ``split=(n, dim)`` cuts a dimension of the matrices into n equal parts, each a matrix.

    Args:
        param: a dense tensor.
        group: the parameter group.
        which: name of the parameter, for error messages.

    Raises:
        ValueError: the parameter has fewer than two dimensions, or ``split`` does not fit it.
    """
    if param.dim() < 2:
        raise ValueError(
            f"{which} is not a matrix, so Muon cannot orthogonalise it: put it in a group with "
            "use_muon=False, which AdamW steps (onepass.muon_groups makes both groups)"
        )
    if not is_dense(param):
        raise ValueError(f"{which}: its strides {param.stride()} leave gaps or overlap")
    dims = [_Dim(*pair) for pair in zip(param.shape, param.stride(), strict=True)]
    flatten = group.get("flatten")
    if flatten is None:
        flatten = param.dim() > 3
    at = 0 if flatten else param.dim() - 2
    batch, rows, cols = dims[:at], [dims[at]], dims[at + 1 :]
    if group.get("split") is not None:
        _split(group["split"], dims, at, batch, rows, cols, which)
    order = "strided"
    for name, both in (("rows", (*rows, *cols)), ("columns", (*cols, *rows))):
        if order == "strided" and _is_contiguous((*batch, *both)):
            order = name
    every = (*batch, *rows, *cols)
    return Matrices(
        _product(rows),
        _product(cols),
        tuple(dim.size for dim in every),
        tuple(dim.stride for dim in every),
        len(batch),
        order,
    )


def _split(
    split: tuple[int, int],
    dims: list[_Dim],
    at: int,
    batch: list[_Dim],
    rows: list[_Dim],
    cols: list[_Dim],
    which: str,
) -> None:
    """Cuts a row or column dimension; batch, rows and cols are changed in place.

    Args:
        split: the number of parts, and the dimension.
        dims: the dimensions of the parameter.
        at: the position of the row dimension in dims.
        batch, rows, cols: the dimensions by their role.
        which: name of the parameter, for error messages.
    """
    count, number = split
    if not -len(dims) <= number < len(dims):
        raise ValueError(f"split={split} names a dimension that {which} does not have")
    number %= len(dims)
    size, stride = dims[number]
    if number < at:
        raise ValueError(
            f"split={split}: dimension {number} of {which} counts matrices, so it cannot be split"
        )
    if size % count:
        raise ValueError(f"split={split}: {count} does not divide {size}, a dimension of {which}")
    part = size // count
    batch.append(_Dim(count, part * stride))
    held, position = (rows, 0) if number == at else (cols, number - at - 1)
    held[position] = _Dim(part, stride)


def _product(dims: Sequence[_Dim]) -> int:
    return math.prod(dim.size for dim in dims)


def _is_contiguous(dims: Sequence[_Dim]) -> bool:
    """Whether elements in the order of these dimensions are consecutive in memory."""
    expected = 1
    for size, stride in reversed(dims):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
