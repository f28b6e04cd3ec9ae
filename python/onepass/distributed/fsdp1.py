"""The states that FSDP1's ``optim_state_dict`` cannot take."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.group_options import option

_ATTRIBUTE = "_fsdp_flattened"  # that FSDP1 sets on the parameters it manages
_READERS = (
    "torch.distributed.fsdp.fully_sharded_data_parallel",
    "torch.distributed.checkpoint.state_dict",
)


def _reshapes(name: str) -> bool:
    """Whether a format saves a tensor of another shape than the parameter's."""
    states, weights = STATE_FORMATS.get(name), WEIGHT_FORMATS.get(name)
    if weights is not None and weights.saved_as_bytes:
        return True
    return states is not None and states.scale is not None


def check_reader(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a state dict that FSDP1 asks for and cannot use.

    FSDP1 cuts and joins states by the shape of their parameter, which scales, packed codes and
    companions that are saved as bytes do not have, and then fails with an error of sizes that names
    none of them. A rank's own ``state_dict()`` is not cut and passes, so the caller is looked at.

    Raises:
        ValueError: a group of FSDP1's parameters has such states, and FSDP1 or
            torch.distributed.checkpoint is calling.
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
                f"FSDP1's optim_state_dict cannot take {refused[0]}: it cuts states by the shape "
                "of their parameter, and scales and packed values have another. Use FSDP2 "
                "(fully_shard), or save the optimizer.state_dict() of each rank"
            )
        frame = frame.f_back
