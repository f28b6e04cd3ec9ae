"""A loss scaler that uses the optimizer's norm pass to detect non-finite gradients."""

from __future__ import annotations

from typing import Any

import torch

from . import Optimizer


class GradScaler(torch.amp.GradScaler):  # type: ignore[misc]
    """torch.amp.GradScaler whose step saves one pass over the gradients and never writes them.

    For an onepass optimizer, ``step(optimizer)`` takes the count of non-finite gradients from the
    optimizer's norm pass. ``max_grad_norm`` uses the same pass, so the gradients are read twice in
    total. torch's class also works with onepass but reads and writes the gradients in an extra
    pass. With other optimizers, and after ``unscale_()``, this class behaves like torch's.

    Source: torch.amp.GradScaler's contract for optimizers that unscale in their step.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Runs ``optimizer.step()``, or skips it if a gradient is not finite.

        Args:
            optimizer: the optimizer to step; an onepass optimizer unscales in its step.
            args, kwargs: passed to ``optimizer.step()``.

        Returns:
            The result of ``optimizer.step()``.
        """
        if not isinstance(optimizer, Optimizer) or optimizer.scales_in_step:
            return super().step(optimizer, *args, **kwargs)
        # The optimizer unscales in this step, even if it was made without fused=True.
        optimizer.scales_in_step = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.scales_in_step = False

    # torch's step() calls this before the step of an optimizer that unscales itself, unless
    # unscale_() was called.
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
