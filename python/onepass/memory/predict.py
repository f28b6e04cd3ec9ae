"""Predicts the bytes of a onepass optimizer from the library's own tables.

``held_layouts`` (engine/state_layouts.py) lists the state tensors of a parameter, and ``places_of``
(paging/pager.py) decides which of them are paged. This module repeats no rule and no format.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..engine.hyper_table import counter_bytes
from ..engine.state_allocator import allocated
from ..engine.state_layouts import COMPANIONS, EMA, held_layouts
from ..optim import Optimizer
from ..paging.pager import places_of
from .report import Bytes


def block_of(device: torch.device) -> int:
    """The allocation granularity of a device in bytes; storage sizes are rounded up to it."""
    return allocated(1, device)


def storage_bytes(tensors: Iterable[torch.Tensor], block: int = 1) -> int:
    """Bytes of the storages of tensors, with a storage shared by views counted once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(-(-n // block) * block for n in found.values())


def category_of(key: str) -> str:
    """The category of a state tensor, by its key."""
    if key == EMA:
        return "ema"
    return "companions" if key in COMPANIONS else "moments"


def predict(
    optimizer: Optimizer,
    grad_dtype: torch.dtype | None = None,
    block: int | None = None,
    device: torch.device | None = None,
) -> Bytes:
    """Predicts the bytes of parameters, gradients and states after the first step.

    No tensor is allocated, and parameters may be on the meta device.

    Args:
        optimizer: a onepass optimizer with any groups, formats and options.
        grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
        block: the size in bytes to which storages are rounded up; None for the granularity of the
            parameters' device.
        device: the device of the steps; None for the parameters' device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in params if p.requires_grad]
    if block is None:
        block = block_of(params[0].device)

    def rounded(nbytes: int) -> int:
        return -(-nbytes // block) * block

    found = {"moments": 0, "companions": 0, "ema": 0}
    paged: set[torch.Tensor] = set()
    ring = host = 0
    if optimizer.paging is not None:
        groups = [
            {**g, "params": [p for p in g["params"] if p.requires_grad]}
            for g in optimizer.param_groups
        ]
        places = places_of(groups, optimizer.rule, optimizer.paging)
        paged = places.paged
        ring = sum(rounded(part.ring) for part in places.footprints.values())
        host = sum(part.host for part in places.footprints.values())
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if p.requires_grad]
        # The counters of all groups share one storage.
        found["moments"] += counter_bytes(optimizer.rule.of(group)) if members else 0
        for param in members:
            if param in paged:
                continue
            for layout in held_layouts(param, optimizer.rule, group):
                found[category_of(layout.key)] += rounded(layout.nbytes)
    scratch = sum(map(rounded, optimizer.scratch_sizes(device or params[0].device)))
    return Bytes(
        scratch=scratch,
        weights=storage_bytes(params, block),
        gradients=sum(rounded(p.numel() * (grad_dtype or p.dtype).itemsize) for p in trained),
        ring=ring,
        host=host,
        **found,
    )
