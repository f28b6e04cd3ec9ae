"""Symmetric products of batches of matrices, for the orthogonalisation of Muon.

X X^T and the square of a symmetric matrix are symmetric: a program computes one tile of the lower
triangle and stores it twice, the second time transposed. This takes about half of the
multiplications of an ordinary product.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .table import INTERPRETED

# Rows and columns of a tile, and terms that are added at once. Untuned.
TILE = 64
DEPTH = 32
OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["alpha", "beta"])
def lower_triangle(
    x_ptr, add_ptr, out_ptr, size, depth, x_batch, x_row, x_term, alpha, beta,
    PLUS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of out = alpha X X^T + beta A, and its mirror image.

    Program (t, b) computes the t-th tile of the lower triangle, row by row, of matrix b. X is
    [b, size, depth] with strides x_batch, x_row, x_term; A and out are contiguous
    [b, size, size]. PLUS: whether to add A; otherwise add_ptr is not read.
    WIDEN: whether to multiply in fp32, because the interpreter multiplies the bits of bf16 numbers.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded, so the row may be off by one.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    rows, columns = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    terms = tl.arange(0, DEPTH)
    x_ptr += batch * x_batch
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, depth, DEPTH):
        inside = first + terms < depth
        offsets = (first + terms).to(tl.int64) * x_term
        left = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * x_row + offsets[None, :],
            mask=(rows < size)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x_ptr + columns.to(tl.int64)[None, :] * x_row + offsets[:, None],
            mask=(columns < size)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    mask = (rows < size)[:, None] & (columns < size)[None, :]
    matrix = batch * size * size
    offsets = matrix + rows.to(tl.int64)[:, None] * size + columns[None, :]
    result = alpha * sums
    if PLUS:
        result += beta * tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    result = result.to(out_ptr.dtype.element_ty)
    # A tile on the diagonal stores its own lower triangle, because its sums may have been added in
    # another order above the diagonal.
    below = rows[:, None] >= columns[None, :]
    tl.store(out_ptr + offsets, result, mask=mask & below)
    mirrored = matrix + columns.to(tl.int64)[None, :] * size + rows[:, None]
    tl.store(out_ptr + mirrored, result, mask=mask & below)


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    add: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """out = alpha X X^T + beta A for each matrix of a batch.

    Args:
        x: [n, m, k] of any strides, fp32 or bf16.
        out: contiguous [n, m, m] of the same dtype; written.
        add: contiguous symmetric [n, m, m], or None. It must not be out.
        alpha, beta: the factors.
    """
    n, size, depth = x.shape
    tiles = triton.cdiv(size, TILE)
    grid = tiles * (tiles + 1) // 2, n
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        lower_triangle[grid](
            x, out if add is None else add, out, size, depth, *x.stride(), alpha, beta,
            PLUS=add is not None, TILE=TILE, DEPTH=DEPTH, WIDEN=INTERPRETED, **OPTIONS,
        )  # fmt: skip
