"""Results of a step besides parameters and states: norm, telemetry and averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..engine.interrupts import Uninterrupted
from ..engine.plan import Plan
from ..engine.state_layouts import EMA
from ..numerics.verdict import NORM, SCALE, SKIPPED
from ..rules.group_options import option


class Findings(torch.optim.Optimizer):
    """The part of :class:`Optimizer` that gives access to the results of the last step.

    Attributes:
        measures: whether steps measure telemetry.
        verdict: the verdict on the last step, see :mod:`onepass.numerics.verdict`; None before the
            first step that needs one.
    """

    measures: bool
    verdict: torch.Tensor | None
    _plan: Plan | None
    _swapped: bool

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The global norm of the last step's gradients before clipping, divided by the loss scale.

        An fp32 0-dim tensor on the device; None before the first step with ``max_grad_norm`` or
        ``skip_nonfinite``.
        """
        return None if self.verdict is None else self.verdict[NORM].float()

    @property
    def skipped_steps(self) -> torch.Tensor:
        """Number of steps skipped because of a non-finite gradient, as an int64 0-dim tensor.

        The count includes steps that torch.amp.GradScaler skipped inside ``step()``. The tensor is
        on the device and is not part of a state dict.
        """
        if self.verdict is None:
            return torch.tensor(0, dtype=torch.int64, device="cpu")
        return self.verdict[SKIPPED].long()

    @property
    def telemetry(self) -> list[dict[str, torch.Tensor]]:
        """Measurements of the last step: for each group, a dictionary of 0-dim device tensors.

        - ``grad_norm``: norm of the gradients before clipping, divided by the loss scale.
        - ``weight_norm``: norm of the weights after the step.
        - ``update_norm``: norm of the change of the fp32 weights; 0 for a skipped step.
        - ``nonfinite``: number of infinite or NaN gradient elements.

        Raises:
            RuntimeError: ``telemetry=True`` is not set, or no step has been taken.
        """
        if not self.measures or self._plan is None:
            raise RuntimeError(
                "telemetry needs an optimizer with telemetry=True, and a step with the current "
                "parameters"
            )
        scale = 1.0 if self.verdict is None else self.verdict[SCALE]
        found = []
        for sums in self._plan.telemetry(self.param_groups):
            grad, weight, update = sums[:3].sqrt().unbind()
            norms = {"grad_norm": grad / scale, "weight_norm": weight, "update_norm": update}
            found.append(norms | {"nonfinite": sums[3].long()})
        return found

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """A context in which the weights are replaced by their averages, rounded to their dtype.

        The weights change in place and get their old bits back at the end. The context stores a
        copy of the weights, which takes as much memory as the weights. Weights without an average
        do not change; averages are created at the first step.

        Raises:
            RuntimeError: no group has ``ema_decay``, or step() or this method is called inside the
                context.
        """
        self.check_swapped()
        params = [p for p, state in self.state.items() if EMA in state]
        if not params and all(option(group, "ema_decay") is None for group in self.param_groups):
            raise RuntimeError("weights have no averages: no parameter group has ema_decay")
        with torch.no_grad():
            kept = [p.detach().clone() for p in params]
            try:
                with Uninterrupted():
                    self._swapped = True
                    for p in params:
                        p.copy_(self.state[p][EMA])
                yield
            finally:
                with Uninterrupted():
                    for p, value in zip(params, kept, strict=True):
                        p.detach().copy_(value)
                    self._swapped = False

    def check_swapped(self) -> None:
        """Raises RuntimeError inside :meth:`averaged_weights`."""
        if self._swapped:
            raise RuntimeError(
                "the weights are replaced by their averages: leave averaged_weights() first"
            )
