"""Takes the changed weights of a parameter list from their records of changes."""

from __future__ import annotations

import importlib

import torch

from . import libraries
from .backends import BACKENDS
from .backends.base import WORD
from .numpy_codec import flat

Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def take_changes(records: list[torch.Tensor], params: list[torch.Tensor], wide: bool) -> Taken:
    """The changed weights of parameters of one dtype and device; clears the records.

    On a GPU with Triton there are two kernel launches for the whole list: one counts, one writes.
    On the CPU it is one call of the library. Otherwise torch's operations do it, parameter by
    parameter.

    Args:
        records: int32, one bit per weight, see :class:`onepass.engine.backends.Entry`; set to zero.
        params: dense tensors.
        wide: whether positions are int64; int32 otherwise.

    Returns:
        The number of changes of each parameter (int64, on the CPU), and for all of them, parameter
        by parameter, the positions in memory order and the values. The call waits for the device.
    """
    device = params[0].device
    if device.type == "cpu" and not libraries.missing:
        taken: Taken = torch.ops.onepass.take_changes(records, params, wide)
        return taken
    if device.type == "cuda" and not BACKENDS["triton"].unavailable(device):
        kernels = importlib.import_module("onepass.triton_kernels.changes")
        with torch.cuda.device(device):
            return kernels.launch(records, params, wide)
    return _take_by_torch(records, params, wide)


def _take_by_torch(records: list[torch.Tensor], params: list[torch.Tensor], wide: bool) -> Taken:
    """See :func:`take_changes`."""
    kind = torch.int64 if wide else torch.int32
    positions, values = [], []
    bits = torch.arange(WORD, dtype=torch.int32, device=records[0].device)
    for record, param in zip(records, params, strict=True):
        words = record.nonzero()
        found = ((record[words] >> bits) & 1).nonzero()
        at = words[found[:, 0], 0] * WORD + found[:, 1]
        positions.append(at.to(kind))
        values.append(flat(param)[at])
    for record in records:
        record.zero_()
    counts = torch.tensor([len(at) for at in positions], dtype=torch.int64, device="cpu")
    return counts, torch.cat(positions), torch.cat(values)
