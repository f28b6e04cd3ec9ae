"""Paged states: optimizer states larger than the device. See docs/paging.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .options import Paging
from .pager import Footprint, places_of

if TYPE_CHECKING:
    from ..optim import Optimizer

__all__ = ["Footprint", "Paging", "footprints"]


def footprints(optimizer: Optimizer) -> dict[torch.device, Footprint]:
    """Bytes that the states of an optimizer will take, or take, by device of the parameters.

    Of all its parameters, as they, the options of their groups and ``paged`` are now; before the
    first step too. Peak device memory is resident + ring, beside parameters, gradients and the
    tables of plans. Nothing is changed.

    Raises:
        ValueError: the optimizer is not paged.
    """
    if optimizer.paging is None:
        raise ValueError("footprints needs an optimizer with paged states: paged=True, or a budget")
    return places_of(optimizer.param_groups, optimizer.rule, optimizer.paging).footprints
