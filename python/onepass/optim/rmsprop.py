"""The RMSprop optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.rmsprop import RULE
from .base import Optimizer
from .options import Options


class RMSprop(Optimizer):
    r"""RMSprop, as torch.optim.RMSprop.

    .. math::
        g &\leftarrow g + \lambda\theta \quad\text{(unless decay is decoupled)} \\
        s &\leftarrow \alpha s + (1 - \alpha) g^2 \\
        a &\leftarrow \alpha a + (1 - \alpha) g,\; v = \max(s - a^2, 0) \text{ (centered)},\;
            v = s \text{ (otherwise)} \\
        d &= g / (\sqrt{v} + \epsilon) \\
        b &\leftarrow \mu b + d,\; d = b \quad\text{(momentum)} \\
        \theta &\leftarrow \theta - \eta d

    With ``eps_in_sqrt`` the denominator is :math:`\sqrt{v + \epsilon}`. torch.optim has no maximum:
    its root is NaN if rounding makes :math:`s - a^2` negative.

    State: ``square_avg``, with momentum ``momentum_buffer`` and, if centered, ``grad_avg``, each of
    the parameter's shape; ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        alpha: in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        momentum: :math:`\mu`, at least 0.
        centered: divide by the standard deviation instead of the root mean square. Do not use it
            with states in blocks ("mx8", "mx4", "dynamic8"), whose rounding errors exceed
            :math:`s - a^2`. Use it with "bf16" only if gradients are mostly noise.
        eps_in_sqrt: keyword-only; add :math:`\epsilon` inside the root.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Hinton, "Neural networks for machine learning", lecture 6e (2012); centered: Graves,
    "Generating sequences with recurrent neural networks" (2013).
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        eps_in_sqrt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "eps_in_sqrt": eps_in_sqrt,
        }
        super().__init__(params, defaults, **options)
