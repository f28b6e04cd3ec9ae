"""Takes the changed weights of a parameter list: one launch counts them, one writes them."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from onepass.engine.backends.base import WORD

from .table import tuning

# Columns of the table of pieces, int64, with one row per program.
RECORD = tl.constexpr(0)  # address of the first word
PARAM = tl.constexpr(1)  # address of the parameter's first element
FIRST = tl.constexpr(2)  # position of the first element of the piece in the parameter
COUNT = tl.constexpr(3)  # number of words
COLUMNS = tl.constexpr(4)

PIECE = 256  # words of a record per program: 8192 weights


@triton.jit
def bits_of_words(row, BLOCK: tl.constexpr):
    """The words of a piece, and 1 for each changed weight: int32 [BLOCK] and [BLOCK, 32]."""
    ptr = tl.load(row + RECORD).to(tl.pointer_type(tl.int32))
    lanes = tl.arange(0, BLOCK)
    words = tl.load(ptr + lanes, mask=lanes < tl.load(row + COUNT), other=0)
    return words, (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def count_changes(table_ptr, counts_ptr, BLOCK: tl.constexpr):
    """Writes the number of changed weights of each piece."""
    piece = tl.program_id(0).to(tl.int64)
    _, bits = bits_of_words(table_ptr + piece * COLUMNS, BLOCK)
    tl.store(counts_ptr + piece, tl.sum(tl.sum(bits, axis=1), axis=0).to(tl.int64))


@triton.jit
def write_changes(
    table_ptr, ends_ptr, counts_ptr, positions_ptr, values_ptr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes positions and codes of the changed weights of each piece, and clears its bits."""
    piece = tl.program_id(0).to(tl.int64)
    total = tl.load(counts_ptr + piece)
    if total > 0:
        row = table_ptr + piece * COLUMNS
        begin = tl.load(ends_ptr + piece) - total
        _, bits = bits_of_words(row, BLOCK)
        flat = tl.reshape(bits, [BLOCK * 32])
        to = begin + tl.cumsum(flat, axis=0) - flat
        at = tl.load(row + FIRST) + tl.arange(0, BLOCK * 32)
        changed = flat != 0
        POSITION: tl.constexpr = tl.int64 if WIDE else tl.int32
        CODE: tl.constexpr = values_ptr.dtype.element_ty
        weights = tl.load(row + PARAM).to(tl.pointer_type(CODE))
        tl.store(positions_ptr + to, at.to(POSITION), mask=changed)
        tl.store(values_ptr + to, tl.load(weights + at, mask=changed), mask=changed)
        lanes = tl.arange(0, BLOCK)
        record = tl.load(row + RECORD).to(tl.pointer_type(tl.int32))
        zeros = tl.zeros([BLOCK], tl.int32)
        tl.store(record + lanes, zeros, mask=lanes < tl.load(row + COUNT))


def launch(
    records: list[torch.Tensor], params: list[torch.Tensor], wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes the changed weights; see :func:`onepass.engine.changed_weights.take_changes`."""
    device = params[0].device
    tables, pieces = [np.zeros((0, int(COLUMNS)), np.int64)], []
    for record, param in zip(records, params, strict=True):
        starts = np.arange(0, len(record), PIECE)
        table = np.zeros((len(starts), int(COLUMNS)), np.int64)
        table[:, RECORD] = record.data_ptr() + starts * record.element_size()
        table[:, PARAM] = param.data_ptr()
        table[:, FIRST] = starts * WORD
        table[:, COUNT] = np.minimum(len(record) - starts, PIECE)
        tables.append(table)
        pieces.append(len(starts))
    rows = torch.from_numpy(np.concatenate(tables)).to(device)
    codes = torch.int16 if params[0].element_size() == 2 else torch.int32
    found = torch.zeros(len(rows) + 1, dtype=torch.int64, device=device)
    counts, options = found[1:], {"BLOCK": PIECE, "num_warps": tuning(device).num_warps}
    if len(rows):
        count_changes[(len(rows),)](rows, counts, **options)
    ends = found.cumsum(0)
    # One copy to the host tells the number of changes of each parameter.
    at = np.concatenate([[0], np.cumsum(pieces)])
    per_param = ends[torch.from_numpy(at).to(device)].cpu().diff()
    total = int(per_param.sum())
    kind = torch.int64 if wide else torch.int32
    positions = torch.empty(total, dtype=kind, device=device)
    values = torch.empty(total, dtype=codes, device=device)
    if total:
        write_changes[(len(rows),)](
            rows, ends[1:], counts, positions, values, WIDE=wide, **options
        )  # fmt: skip
    return per_param, positions, values.view(params[0].dtype)
