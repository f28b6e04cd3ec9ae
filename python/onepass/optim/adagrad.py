"""The Adagrad optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.adagrad import RULE
from .base import Optimizer
from .options import Options


class Adagrad(Optimizer):
    r"""Adagrad, as torch.optim.Adagrad; step t counts from 1.

    .. math::
        g &\leftarrow g + \lambda\theta \quad\text{(unless decay is decoupled)} \\
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1 + (t - 1)\kappa}
            \cdot \frac{g}{\sqrt{s} + \epsilon}

    With ``eps_in_sqrt`` the denominator is :math:`\sqrt{s + \epsilon}`, as in the literature.

    State: ``sum`` of the parameter's shape, ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        lr_decay: :math:`\kappa`.
        weight_decay: :math:`\lambda`.
        initial_accumulator_value: initial value of :math:`s`.
        eps: :math:`\epsilon`.
        eps_in_sqrt: keyword-only; add :math:`\epsilon` inside the root.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic
    optimization" (2011).
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        eps_in_sqrt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "eps_in_sqrt": eps_in_sqrt,
        }
        super().__init__(params, defaults, **options)
