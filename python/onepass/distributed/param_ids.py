"""Numbers that key the random bits of parameters, where optimizers share a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

ATTRIBUTE = "onepass_number"


def number_parameters(parameters: torch.nn.Module | Iterable[torch.Tensor]) -> None:
    """Gives each parameter the number that keys its random bits, whichever optimizer it comes to.

    Without it the number is the position in the optimizer. So it is needed only where an optimizer
    has some of a model's parameters and the bits are to be those of one that has all:
    ``ZeroRedundancyOptimizer``, which deals them out to ranks, and stages of a pipeline. Call it on
    every rank, after fully_shard and before the first step.

    Args:
        parameters: a model, or parameters in the order of the optimizer that has all of them: they
            get the numbers 0, 1, 2, ... as an attribute; nothing else is changed.
    """
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    for number, param in enumerate(parameters):
        setattr(param, ATTRIBUTE, number)


def number_of(param: torch.Tensor, position: int) -> int:
    """The number that a parameter was given, else its position in the optimizer."""
    return int(getattr(param, ATTRIBUTE, position))
