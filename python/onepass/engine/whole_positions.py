"""Where the elements of a local tensor are in the whole parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """The place of a local tensor in its whole parameter.

    A position is an index into the flattened parameter: ``param.reshape(-1)[position]``.

    Attributes:
        shape: shape of the whole parameter.
        local_shape, local_stride: shape and strides of the local tensor, which is dense.
        offset: for each dimension, the index of the first local element in the whole parameter.
        owned: whether this rank reports the elements. False on all but one of the ranks that hold
            the same elements of a replicated DTensor.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    local_stride: tuple[int, ...]
    offset: tuple[int, ...]
    owned: bool = True

    @property
    def complete(self) -> bool:
        """Whether the local tensor is the whole parameter."""
        return self.shape == self.local_shape

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """The positions of local elements.

        Args:
            elements: int32 or int64 [n], indices in the memory order of the local tensor.

        Returns:
            A tensor of the same shape and dtype; ``elements`` itself if nothing changes. It is
            sorted if ``elements`` is sorted and the local tensor is contiguous.
        """
        tail = math.prod(self.shape[1:])
        if self._in_order() and self.local_shape[1:] == self.shape[1:]:
            first = self.offset[0] * tail if self.shape else 0
            return elements + first if first else elements
        rest, found = elements, torch.zeros_like(elements)
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        for d in sorted(range(len(self.shape)), key=lambda d: -self.local_stride[d]):
            if self.local_shape[d] > 1:
                index = rest.div(self.local_stride[d], rounding_mode="floor")
                rest = rest - index * self.local_stride[d]
                found = found + index * strides[d]
            found = found + self.offset[d] * strides[d]
        return found

    def _in_order(self) -> bool:
        """Whether the local tensor is contiguous."""
        expected = 1
        for size, stride in zip(
            reversed(self.local_shape), reversed(self.local_stride), strict=True
        ):
            if size > 1 and stride != expected:
                return False
            expected *= max(size, 1)
        return True


def whole_place(tensor: torch.Tensor) -> Place:
    """The place of a tensor that is the whole parameter."""
    shape = tuple(tensor.shape)
    return Place(shape, shape, tensor.stride(), (0,) * len(shape))
