"""Sums over the ranks among which an optimizer's parameters are divided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..engine.plan_request import ProcessGroups
from .shards import Shard


class Ranks:
    """Sums norms and telemetry over the ranks of each parameter's process groups.

    The collectives depend on all parameters of the optimizer but not on the gradients, so every
    rank calls the same collectives at every step. A replicated parameter counts once.

    Args:
        params: all parameters of the optimizer.
        shards: parameter -> its shard, for all DTensors.
        norm_group: process group of ranks with different parameters; True for all ranks; None if
            there is no such group.

    Raises:
        RuntimeError: ``norm_group`` is given but torch.distributed is not initialised.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], shards: dict[torch.Tensor, Shard], norm_group: Any
    ) -> None:
        more: ProcessGroups = () if norm_group is None else (_resolved(norm_group),)
        local: torch.Tensor | None = None
        kinds: dict[ProcessGroups, None] = {}
        for param in params:
            shard = shards.get(param)
            kinds[() if shard is None else shard.groups] = None
            if local is None:
                local = param if shard is None else shard.local
        self._kinds = list(kinds) or [()]
        self._over = [(*kind, *more) for kind in self._kinds]
        self._groups = list(dict.fromkeys(group for over in self._over for group in over))
        self._device = _device_of(more) if local is None else local.device

    def norm(self, parts: list[tuple[ProcessGroups, torch.Tensor]], largest: bool) -> torch.Tensor:
        """Combines the results of :meth:`Backend.norm` on all ranks.

        Calls one sum all-reduce for each group and, if largest is set, one maximum all-reduce.
        Without largest, the returned largest magnitude covers only this rank.

        Args:
            parts: process groups and float64 [3] of each part of the plan on this rank.
            largest: whether the norm is the largest magnitude.
        """
        from torch.distributed import ReduceOp

        device = parts[0][1].device if parts else self._device
        found = torch.zeros(len(self._kinds), 3, dtype=torch.float64, device=device)
        for kind, part in parts:
            row, part = found[self._kinds.index(kind)], part.to(device, non_blocking=True)
            top = torch.maximum(row[1], part[1])
            row += part
            row[1] = top
        sums = self._reduce(found[:, ::2].contiguous(), ReduceOp.SUM).sum(0)
        tops = found[:, 1].contiguous()
        if largest:
            tops = self._reduce(tops, ReduceOp.MAX)
        return torch.stack([sums[0], tops.max(), sums[1]])

    def sums(
        self, parts: list[tuple[ProcessGroups, torch.Tensor]], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """The sum of float64 tensors of one shape over the parts of the plan on all ranks."""
        from torch.distributed import ReduceOp

        device = parts[0][1].device if parts else self._device
        found = torch.zeros(len(self._kinds), *shape, dtype=torch.float64, device=device)
        for kind, part in parts:
            found[self._kinds.index(kind)] += part
        return self._reduce(found, ReduceOp.SUM).sum(0)

    def _reduce(self, table: torch.Tensor, op: Any) -> torch.Tensor:
        """All-reduces each row of a table over the row's process groups, in place."""
        from torch.distributed import all_reduce

        for group in self._groups:
            rows = [i for i, over in enumerate(self._over) if group in over]
            if len(rows) == len(self._over):
                all_reduce(table, op, group=group)
            else:
                part = table[rows]
                all_reduce(part, op, group=group)
                table[rows] = part
        return table


def _resolved(group: Any) -> Any:
    """The process group of a ``norm_group`` value."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise RuntimeError(
            "norm_group needs an initialized process group: call "
            "torch.distributed.init_process_group() first"
        )
    return dist.group.WORLD if group is True else group


def _device_of(groups: ProcessGroups) -> torch.device:
    """The device on which a rank without parameters takes part in collectives."""
    import torch.distributed as dist

    backends = {dist.get_backend(group) for group in groups}
    return torch.device("cuda" if backends == {"nccl"} else "cpu")
