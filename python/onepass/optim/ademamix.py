"""The AdEMAMix optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..rules.ademamix import RULE
from .base import Optimizer
from .options import Options


class AdEMAMix(Optimizer):
    r"""AdamW with a second, slow average of the gradients; step t counts from 1.

    .. math::
        g &\leftarrow g + \lambda\theta \quad\text{(unless decay is decoupled)} \\
        m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g, \quad
        m_2 \leftarrow \beta_{3,t} m_2 + (1 - \beta_{3,t}) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta \cdot
            \frac{m_1 / (1 - \beta_1^t) + \alpha_t m_2}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
            - \eta\lambda\theta \quad\text{(the last term if decay is decoupled)}

    :math:`\alpha_t` rises linearly from 0 to :math:`\alpha` over the first ``t_alpha`` steps, and
    :math:`\beta_{3,t}` from :math:`\beta_1` to :math:`\beta_3` over the first ``t_beta3`` steps so
    that the half-life of the slow average rises linearly. The slow average has no bias correction.

    State: ``exp_avg`` (m1), ``exp_avg_slow`` (m2) and ``exp_avg_sq`` (v), each of the parameter's
    shape; the number ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: learning rate, a float or a 0-dim tensor.
        betas: :math:`\beta_1, \beta_2, \beta_3`, each in [0, 1).
        alpha: :math:`\alpha`, the weight of the slow average, at least 0.
        t_alpha: steps over which alpha rises; None for no warm-up. The paper sets the number of all
            steps of the training.
        t_beta3: steps over which :math:`\beta_3` rises, likewise.
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        options: keyword-only, see :class:`Options`; ``decoupled_weight_decay`` is True by default.

    Raises:
        ValueError: an argument is out of range.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix optimizer: better, faster, older" (2024).
    """

    rule = RULE
    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with the default ``states="mx8"``; states take 3.09 bytes per parameter."""

    default_states = "mx8"


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with the default ``paged=True``."""

    default_paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix8bit` with the default ``paged=True``."""

    default_paged = True
