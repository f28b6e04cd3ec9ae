"""The Lion optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.lion import RULE
from .base import Optimizer
from .options import Options


class Lion(Optimizer):
    r"""Lion: updates by the sign of an interpolated momentum, with decoupled weight decay.

    .. math::
        u &= \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g \\
        \theta &\leftarrow \theta - \eta u - \eta\lambda\theta

    sign(0) is 0. A NaN in the gradient makes the weight NaN, so that it does not go unnoticed.

    State: ``exp_avg`` (m) of the parameter's shape, ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor; typically a third to a tenth of AdamW's.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        weight_decay: :math:`\lambda`; typically three to ten times AdamW's.
        cautious_weight_decay: keyword-only; decay a weight only in steps whose update does not move
            it away from 0 (Chen et al., "Cautious weight decay", 2025), where update times weight
            is at least 0. Needs ``decoupled_weight_decay=True``. Also per parameter group.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Chen et al., "Symbolic discovery of optimization algorithms" (2023), program 1.
    """

    rule = RULE
    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults, **options)
