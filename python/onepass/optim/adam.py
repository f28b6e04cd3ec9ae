"""The Adam and AdamW optimizers."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.adam import RULE
from .base import Optimizer
from .options import Options


class Adam(Optimizer):
    r"""Adam with an L2 penalty, as torch.optim.Adam; step t counts from 1.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta \cdot \frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    With ``amsgrad`` the root uses the elementwise maximum of all :math:`v` so far.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with amsgrad, ``max_exp_avg_sq``, each of the
    parameter's shape; ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        amsgrad: use the variant of Reddi, Kale, Kumar, "On the convergence of Adam and beyond"
            (2018).
        cautious_weight_decay: keyword-only; decay a weight only in steps whose update does not move
            it away from 0 (Chen et al., "Cautious weight decay", 2025), where update times weight
            is at least 0. Needs ``decoupled_weight_decay=True``. Also per parameter group.
        options: keyword-only, see :class:`Options`.

    Raises:
        ValueError: an argument is out of range.

    Source: Kingma, Ba, "Adam: a method for stochastic optimization" (2015).
    """

    rule = RULE

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults, **options)


class AdamW(Adam):
    r"""Adam with decoupled weight decay, as torch.optim.AdamW.

    The moments are those of :class:`Adam` without the term :math:`\lambda\theta` in :math:`g`.

    .. math::
        \theta \leftarrow \theta - \eta \cdot \frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} - \eta\lambda\theta

    Both terms are added before the subtraction from the weight, so the weight is rounded once.

    Args, State and Raises: as :class:`Adam`; the default of weight_decay is 1e-2.

    Source: Loshchilov, Hutter, "Decoupled weight decay regularization" (2019).
    """

    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            cautious_weight_decay=cautious_weight_decay,
            **options,
        )
