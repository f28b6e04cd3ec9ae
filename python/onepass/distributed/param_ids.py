"""Parameter numbers, which key the random bits, for optimizers that share a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

ATTRIBUTE = "onepass_number"


def number_parameters(parameters: torch.nn.Module | Iterable[torch.Tensor]) -> None:
    """Assigns each parameter a number that keys its random bits in any optimizer.

    The default number is the position in the optimizer. Call this function if each optimizer has
    only some of a model's parameters and the result bits must equal those of one optimizer with all
    parameters. Examples are ``ZeroRedundancyOptimizer``, which distributes parameters over ranks,
    and pipeline stages. Call it on every rank, after fully_shard and before the first step.

    Args:
        parameters: a model, or all parameters in the order of the single optimizer. They get the
            numbers 0, 1, 2, ... as an attribute; nothing else is changed.
    """
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    for number, param in enumerate(parameters):
        setattr(param, ATTRIBUTE, number)


def number_of(param: torch.Tensor, position: int) -> int:
    """The number of a parameter; its position in the optimizer if no number was assigned."""
    return int(getattr(param, ATTRIBUTE, position))
