"""A loss scaler that asks the optimizer whether its gradients are finite."""

from __future__ import annotations

from typing import Any

import torch

from . import Optimizer


class GradScaler(torch.amp.GradScaler):  # type: ignore[misc]
    """torch.amp.GradScaler, whose step reads the gradients once less and never writes them.

    ``step(optimizer)`` on an onepass optimizer takes the count of non-finite gradients from the
    optimizer's own norm pass, which ``max_grad_norm`` shares: two passes over the gradients in all.
    torch's class works with onepass too, and checks in a pass of its own that reads and rewrites
    them. With other optimizers, and after ``unscale_()``, this class is torch's.

    Source: torch.amp.GradScaler's contract for optimizers that unscale in their step.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(optimizer, Optimizer) or optimizer.scales_in_step:
            return super().step(optimizer, *args, **kwargs)
        # For this step the optimizer scales, whether or not it was made with fused=True.
        optimizer.scales_in_step = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.scales_in_step = False

    # What torch's step() calls before such an optimizer's own, where unscale_() was not called.
    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> Any:
        if not isinstance(optimizer, Optimizer):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found = optimizer.measure()
        if found is None:
            found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        else:
            found_inf = (found[2] > 0).float()
        per_device = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = per_device
        return per_device
