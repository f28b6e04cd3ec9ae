"""Paged states: optimizer states that exceed the device memory. See docs/paging.md."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..rules import Rule
from .options import Paging
from .pager import Footprint, places_of

__all__ = ["Footprint", "Paging", "footprints"]


class PagedOptimizer(Protocol):
    """The part of an optimizer's interface that :func:`footprints` reads.

    Attributes:
        param_groups: the parameter groups.
        paging: how states are paged; None if they are not paged.
        rule: the rule of the optimizer.
    """

    param_groups: list[dict[str, Any]]
    paging: Paging | None

    @property
    def rule(self) -> Rule:
        """The rule of the optimizer."""
        ...


def footprints(optimizer: PagedOptimizer) -> dict[torch.device, Footprint]:
    """Bytes of memory for the states of an optimizer, by device of the parameters.

    The result covers all parameters and uses their current group options and the current ``paged``
    value. The function may be called before the first step and changes nothing. Peak device memory
    is resident + ring, plus parameters, gradients and the tables of plans.

    Args:
        optimizer: an optimizer with paged states.

    Raises:
        ValueError: the optimizer is not paged.
    """
    if optimizer.paging is None:
        raise ValueError(
            "footprints() needs an optimizer with paged states: set paged=True or a budget"
        )
    return places_of(optimizer.param_groups, optimizer.rule, optimizer.paging).footprints
