"""The NAdam optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.nadam import RULE
from .base import Optimizer
from .options import Options


class NAdam(Optimizer):
    r"""Adam with Nesterov momentum, as torch.optim.NAdam; step t counts from 1.

    .. math::
        g &\leftarrow g + \lambda\theta \quad\text{(unless decay is decoupled)} \\
        \mu_t &= \beta_1 (1 - \tfrac12 0.96^{t\psi}), \quad p \leftarrow p \mu_t \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta \cdot \frac{\frac{1 - \mu_t}{1 - p} g
            + \frac{\mu_{t+1}}{1 - p \mu_{t+1}} m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v), each of the parameter's shape; the numbers
    ``step`` and ``mu_product`` (p), which a skipped step does not change.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        momentum_decay: :math:`\psi`, at least 0.
        decoupled_weight_decay: subtract lr * weight_decay * param from the weight instead of
            adding weight_decay * param to the gradient.
        cautious_weight_decay: keyword-only; decay a weight only in steps whose update does not move
            it away from 0 (Chen et al., "Cautious weight decay", 2025), where update times weight
            is at least 0. Needs ``decoupled_weight_decay=True``. Also per parameter group.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Dozat, "Incorporating Nesterov momentum into Adam" (2016).
    """

    rule = RULE

    def __init__(  # type: ignore[misc]  # torch.optim.NAdam takes a shared option by position
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults, decoupled_weight_decay=decoupled_weight_decay, **options)
