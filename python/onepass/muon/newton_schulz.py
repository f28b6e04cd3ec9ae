"""Orthogonalisation of a batch of matrices by the Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .coefficients import Triple
from .products import Products


class Workspace(NamedTuple):
    """The scratch memory of one batch of n matrices of shape [rows, cols].

    Attributes:
        spare: [n, rows, cols].
        gram, polynomial: [n, m, m] with m = min(rows, cols).
        top, norm: [n, 1, 1].
    """

    spare: torch.Tensor
    gram: torch.Tensor
    polynomial: torch.Tensor
    top: torch.Tensor
    norm: torch.Tensor


def elements(rows: int, cols: int) -> int:
    """The elements of a :class:`Workspace` for one matrix."""
    return rows * cols + 2 * min(rows, cols) ** 2 + 2


def orthogonalize(
    products: Products,
    x: torch.Tensor,
    space: Workspace,
    triples: Sequence[Triple],
    eps: float,
    scale: float,
) -> None:
    """Replaces each matrix by ``scale`` times its orthogonalised value.

    .. math::
        X &\\leftarrow X / \\max(\\lVert X \\rVert_F, \\epsilon) \\\\
        A &= X X^T,\\quad B = b A + c A A,\\quad X \\leftarrow a X + B X
        \\quad\\text{for each } (a, b, c)

    A matrix with more rows than columns is multiplied from the right, which has the same result as
    transposing it.

    Args:
        products: the operations.
        x: [n, rows, cols]; changed in place.
        space: scratch memory.
        triples: the coefficients of each iteration.
        eps: the smallest norm.
        scale: multiplies the result.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    # Each iteration writes into the other buffer: start so that the last one writes into x.
    now, other = (space.spare, x) if len(triples) % 2 else (x, space.spare)
    products.normalize(x, eps, space.top, space.norm, out=now)
    for number, (a, b, c) in enumerate(triples, 1):
        if number == len(triples):
            a, b, c = scale * a, scale * b, scale * c
        products.symmetric_product(now, out=space.gram)
        products.symmetric_product_plus(space.gram, b, c, out=space.polynomial)
        products.product_plus(now, space.polynomial, a, out=other)
        now, other = other, now
    if not triples:
        x.mul_(scale)
