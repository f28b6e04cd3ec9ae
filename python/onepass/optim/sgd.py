"""The SGD optimizer with momentum and Nesterov momentum."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.sgd import RULE
from .base import Optimizer
from .options import Options


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum or Nesterov momentum, as torch.optim.SGD.

    .. math::
        g &\leftarrow g + \lambda\theta \quad\text{(unless decay is decoupled)} \\
        b &\leftarrow \mu b + (1 - \tau) g \quad\text{(the first } b \text{ is } g\text{)} \\
        d &\leftarrow g + \mu b \text{ (nesterov)},\; b \text{ (momentum)},\; g \text{ (neither)} \\
        \theta &\leftarrow \theta - \eta d

    Textbooks write :math:`v = \mu v + \eta g,\ \theta = \theta - v`. With :math:`v = \eta b` this
    gives the same weights if lr is constant and dampening is 0. Nesterov's method evaluates the
    gradient at :math:`\theta - \mu v`; this form stores that point as the weights
    (docs/algorithms/sgd.md).

    State: ``momentum_buffer`` of the parameter's shape if momentum is not 0; ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        momentum: :math:`\mu`, at least 0.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`.
        nesterov: use Nesterov momentum; requires momentum > 0 and dampening = 0.
        cautious_weight_decay: keyword-only; decay a weight only in steps whose update does not move
            it away from 0 (Chen et al., "Cautious weight decay", 2025), where update times weight
            is at least 0. Needs ``decoupled_weight_decay=True``. Also per parameter group.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in
    deep learning" (2013).
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults, **options)
