"""Paged states: optimizer states larger than the device. See docs/paging.md."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..rules import Rule
from .options import Paging
from .pager import Footprint, places_of

__all__ = ["Footprint", "Paging", "footprints"]


class PagedOptimizer(Protocol):
    """An optimizer, as far as :func:`footprints` reads it."""

    param_groups: list[dict[str, Any]]
    paging: Paging | None

    @property
    def rule(self) -> Rule: ...


def footprints(optimizer: PagedOptimizer) -> dict[torch.device, Footprint]:
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
