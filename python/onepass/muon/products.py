"""The four operations on batches of matrices that the Newton-Schulz iteration consists of.

Every operation writes into memory of the caller, so that no step runs out of memory between the
momentum and the weights. X is [n, rows, cols], and A, B are [n, m, m] with m = min(rows, cols).
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.bfloat16: (torch.int16, 0x7F80)}
"""dtype -> the integer dtype of its width, and the mask of its exponent bits."""


class Products(Protocol):
    """The operations; an implementation for other hardware replaces all four."""

    def normalize(
        self,
        x: torch.Tensor,
        eps: float,
        top: torch.Tensor,
        norm: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out = x / max(Frobenius norm of x, eps) for each matrix.

        Squares neither overflow nor underflow. out may be x.

        Args:
            x: [n, rows, cols].
            eps: the smallest norm; with 0, a matrix of zeros stays zero.
            top, norm: scratch, [n, 1, 1] of the dtype of x.
            out: like x.
        """

    def symmetric_product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = X X^T; X^T X if X has more rows than columns."""

    def symmetric_product_plus(
        self, a: torch.Tensor, beta: float, alpha: float, out: torch.Tensor
    ) -> None:
        """out = beta A + alpha A A, for symmetric A."""

    def product_plus(
        self, x: torch.Tensor, b: torch.Tensor, beta: float, out: torch.Tensor
    ) -> None:
        """out = beta X + B X; beta X + X B if X has more rows than columns."""


class TorchProducts:
    """The operations by torch's batched products."""

    def normalize(
        self,
        x: torch.Tensor,
        eps: float,
        top: torch.Tensor,
        norm: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See :class:`Products`.

        Dividing by a power of two first keeps the squares in range and changes no other bit.
        """
        integer, mask = _EXPONENT[x.dtype]
        tiny = torch.finfo(x.dtype).tiny
        torch.linalg.vector_norm(x, torch.inf, dim=(1, 2), keepdim=True, out=top)
        top.view(integer).bitwise_and_(mask)
        top.clamp_(min=tiny)
        torch.div(x, top, out=out)
        torch.linalg.vector_norm(out, 2, dim=(1, 2), keepdim=True, out=norm)
        torch.maximum(norm, top.reciprocal_().mul_(eps).clamp_(min=tiny), out=norm)
        out.div_(norm)

    def symmetric_product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Products`."""
        left, right = (x, x.mT) if _is_wide(x) else (x.mT, x)
        torch.bmm(left, right, out=out)

    def symmetric_product_plus(
        self, a: torch.Tensor, beta: float, alpha: float, out: torch.Tensor
    ) -> None:
        """See :class:`Products`."""
        torch.baddbmm(a, a, a, beta=beta, alpha=alpha, out=out)

    def product_plus(
        self, x: torch.Tensor, b: torch.Tensor, beta: float, out: torch.Tensor
    ) -> None:
        """See :class:`Products`."""
        left, right = (b, x) if _is_wide(x) else (x, b)
        torch.baddbmm(x, left, right, beta=beta, out=out)


def _is_wide(x: torch.Tensor) -> bool:
    """Whether matrices have no more rows than columns."""
    return x.shape[1] <= x.shape[2]


class TritonProducts(TorchProducts):
    """Symmetric products by a Triton kernel that computes the lower triangle only."""

    def symmetric_product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Products`."""
        _kernels().launch(x if _is_wide(x) else x.mT, out)

    def symmetric_product_plus(
        self, a: torch.Tensor, beta: float, alpha: float, out: torch.Tensor
    ) -> None:
        """See :class:`Products`."""
        _kernels().launch(a, out, a, alpha, beta)


def _kernels() -> Any:
    """The module with the kernel, imported at the first call."""
    return importlib.import_module("onepass.triton_kernels.symmetric")
