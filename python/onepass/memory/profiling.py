"""``onepass.memory.profile``: any optimizer over any parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..engine.state_tracking import OptimizerState
from ..optim import Optimizer
from .measure import measure as measured_run
from .peers import categorise
from .report import MemoryReport
from .scenarios import predicted_of
from .simulate import CannotSimulateError


def profile(
    optimizer_or_factory: torch.optim.Optimizer | Callable[[list[Any]], Any],
    params: Iterable[torch.Tensor] | torch.nn.Module | None = None,
    *,
    grad_dtype: torch.dtype | None = None,
    measure: bool = False,
    device: str | None = None,
    name: str | None = None,
) -> MemoryReport:
    """What an optimizer takes of memory, in bytes by category.

    ::

        report = onepass.memory.profile(lambda p: onepass.AdamW(p, states="mx8"), model)
        print(report.predicted.peak, report)

    An optimizer of onepass is predicted from the library's tables of formats, any other by a step
    over parameters that have no memory. Neither the optimizer nor the parameters are changed; what
    is measured are steps over new parameters of the same shapes.

    Args:
        optimizer_or_factory: an optimizer, or a function that makes one over a list of parameters.
        params: a module or tensors, of the meta device too. Of an optimizer, None takes its own.
        grad_dtype: of the gradients; None takes that of each parameter.
        measure: also run real steps and count what they allocate.
        device: type of the device, "cpu" or "cuda"; None takes that of the parameters, and the CPU
            for the meta device.
        name: of the report; None takes the class's.

    Raises:
        ValueError: no parameters, or parameters that the optimizer does not have.
    """
    instance = isinstance(optimizer_or_factory, torch.optim.Optimizer)
    like = _listed(optimizer_or_factory if instance else None, params)
    device = device or ("cpu" if like[0].is_meta else like[0].device.type)
    make: Any = _copies(optimizer_or_factory, like) if instance else optimizer_or_factory

    def trained(made: list[torch.nn.Parameter]) -> Any:
        return make(made if instance else [p for p in made if p.requires_grad])

    meta = _on_meta(like)
    probe = trained(meta)
    found = MemoryReport(
        name or type(probe).__name__,
        sum(p.numel() for p in like),
        device,
        ours=isinstance(probe, Optimizer),
    )
    try:
        found.predicted = predicted_of(trained, meta, grad_dtype, device)
    except CannotSimulateError as error:
        found.problem = f"not predicted: {error}"
    if measure:
        found.measured, found.process_peak = measured_run(
            trained, meta, grad_dtype, device, categorise
        )
    return found


def _listed(
    optimizer: Any, params: Iterable[torch.Tensor] | torch.nn.Module | None
) -> list[torch.Tensor]:
    """The parameters that are asked about; those of the optimizer for None."""
    if params is None:
        if optimizer is None:
            raise ValueError("params must be given with a factory: a module, or tensors")
        params = [p for group in optimizer.param_groups for p in group["params"]]
    elif isinstance(params, torch.nn.Module):
        params = params.parameters()
    like = list(params)
    if not like or not all(isinstance(p, torch.Tensor) for p in like):
        raise ValueError("params must be a module or tensors, at least one")
    return like


def _on_meta(like: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Parameters of the same shapes and strides without memory."""
    return [
        torch.nn.Parameter(
            torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), p.requires_grad
        )
        for p in like
    ]


def _copies(optimizer: Any, known: list[Any]) -> Callable[[list[Any]], Any]:
    """Parameters in the place of the known ones -> a copy of the optimizer, without states."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own <= {id(p) for p in known}:
        raise ValueError("params must hold every parameter of the optimizer, or be None")

    def make(params: list[Any]) -> Any:
        state = OptimizerState() if isinstance(optimizer, Optimizer) else defaultdict(dict)
        memo: dict[int, Any] = {id(optimizer.state): state}
        memo |= {id(old): new for old, new in zip(known, params, strict=True)}
        return copy.deepcopy(optimizer, memo)

    return make
