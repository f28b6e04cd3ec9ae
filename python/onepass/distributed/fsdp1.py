"""Detects states that FSDP1's ``optim_state_dict`` does not support."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.group_options import option

_ATTRIBUTE = "_fsdp_flattened"  # FSDP1 sets this attribute on the parameters it manages
_READERS = (
    "torch.distributed.fsdp.fully_sharded_data_parallel",
    "torch.distributed.checkpoint.state_dict",
)


def _reshapes(name: str) -> bool:
    """Whether a format saves a tensor whose shape differs from the parameter's."""
    states, weights = STATE_FORMATS.get(name), WEIGHT_FORMATS.get(name)
    if weights is not None and weights.saved_as_bytes:
        return True
    return states is not None and states.scale is not None


def check_reader(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises if FSDP1 requests a state dict that it does not support.

    FSDP1 splits and joins states by the shape of their parameter. Scales, packed codes and
    companions that are saved as bytes have other shapes, on which FSDP1 fails with a size error
    that names none of them. A rank may still call ``state_dict()`` itself, so this function
    searches the call stack for FSDP1.

    Args:
        groups: ``optimizer.param_groups``.

    Raises:
        ValueError: a group with FSDP1 parameters has such states, and FSDP1 or
            torch.distributed.checkpoint is on the call stack.
    """
    refused = sorted(
        name
        for group in groups
        if any(getattr(param, _ATTRIBUTE, False) for param in group["params"])
        for name in (option(group, "states"), option(group, "weights"))
        if _reshapes(name)
    )
    frame = sys._getframe() if refused else None
    while frame is not None:
        if frame.f_globals.get("__name__") in _READERS:
            raise ValueError(
                f"FSDP1's optim_state_dict cannot take {refused[0]}: it splits states by the shape "
                "of their parameter, but scales and packed values have another shape. Use FSDP2 "
                "(fully_shard), or save the optimizer.state_dict() of each rank"
            )
        frame = frame.f_back
