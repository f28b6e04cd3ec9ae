"""``onepass.memory.profile``: the memory use of any optimizer over any parameters."""

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
    """Predicts, and optionally measures, the memory use of an optimizer by category.

    ::

        report = onepass.memory.profile(lambda p: onepass.AdamW(p, states="mx8"), model)
        print(report.predicted.peak, report)

    The bytes of a onepass optimizer are predicted from the library's format tables. For any other
    optimizer, a step over parameters without memory is simulated. Neither the optimizer nor the
    parameters are changed; a measurement uses new parameters of the same shapes.

    Args:
        optimizer_or_factory: an optimizer, or a function that makes one over a list of parameters.
        params: a module or tensors, possibly on the meta device; None for those of the optimizer.
        grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
        measure: also take real steps and count the allocated bytes.
        device: the device type, "cpu" or "cuda"; None for the device of the parameters, or the CPU
            for parameters on the meta device.
        name: the name of the report; None for the name of the optimizer class.

    Returns:
        A report with bytes by category.

    Raises:
        ValueError: there are no parameters, or ``params`` lacks parameters of the optimizer.
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
    """The parameters as a list; None selects the parameters of the optimizer."""
    if params is None:
        if optimizer is None:
            raise ValueError(
                "params must be given if optimizer is a factory: a module or a list of tensors"
            )
        params = [p for group in optimizer.param_groups for p in group["params"]]
    elif isinstance(params, torch.nn.Module):
        params = params.parameters()
    like = list(params)
    if not like or not all(isinstance(p, torch.Tensor) for p in like):
        raise ValueError(
            "params must be a module or an iterable of tensors, with at least one parameter"
        )
    return like


def _on_meta(like: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Makes meta-device parameters of the same shapes and strides."""
    return [
        torch.nn.Parameter(
            torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"), p.requires_grad
        )
        for p in like
    ]


def _copies(optimizer: Any, known: list[Any]) -> Callable[[list[Any]], Any]:
    """Returns a function that copies the optimizer without states onto replacement parameters."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own <= {id(p) for p in known}:
        raise ValueError("params must contain every parameter of the optimizer, or be None")

    def make(params: list[Any]) -> Any:
        state = OptimizerState() if isinstance(optimizer, Optimizer) else defaultdict(dict)
        memo: dict[int, Any] = {id(optimizer.state): state}
        memo |= {id(old): new for old, new in zip(known, params, strict=True)}
        return copy.deepcopy(optimizer, memo)

    return make
