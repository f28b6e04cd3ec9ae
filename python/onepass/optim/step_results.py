"""What a step leaves beside parameters and states: its norm, its telemetry, averaged weights."""

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
    """Reads them; :class:`Optimizer` sees to their being there.

    Attributes:
        measures: whether steps measure telemetry.
        verdict: on the last step, see :mod:`onepass.numerics.verdict`; None before one that asked
            for any.
    """

    measures: bool
    verdict: torch.Tensor | None
    _plan: Plan | None
    _swapped: bool

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The global norm of the last step's gradients, divided by the scale of the loss, before
        clipping: fp32, 0-dim, on the device. None before a step with ``max_grad_norm`` or
        ``skip_nonfinite``."""
        return None if self.verdict is None else self.verdict[NORM].float()

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped, int64, 0-dim, on the device: for a gradient that is not
        finite, or because torch.amp.GradScaler found one. Not part of a state dict."""
        if self.verdict is None:
            return torch.tensor(0, dtype=torch.int64, device="cpu")
        return self.verdict[SKIPPED].long()

    @property
    def telemetry(self) -> list[dict[str, torch.Tensor]]:
        """Of the last step, for each group, 0-dim on the device: ``grad_norm``, of gradients
        divided by the scale of the loss, before clipping; ``weight_norm``, after the step;
        ``update_norm``, of what the step added to the fp32 weight; ``nonfinite``, how many
        gradients are infinite or NaN. A skipped step has no update.

        Raises:
            RuntimeError: ``telemetry=True`` was not asked for, or no step has been taken.
        """
        if not self.measures or self._plan is None:
            raise RuntimeError("telemetry needs telemetry=True and a step with these parameters")
        scale = 1.0 if self.verdict is None else self.verdict[SCALE]
        found = []
        for sums in self._plan.telemetry(self.param_groups):
            grad, weight, update = sums[:3].sqrt().unbind()
            norms = {"grad_norm": grad / scale, "weight_norm": weight, "update_norm": update}
            found.append(norms | {"nonfinite": sums[3].long()})
        return found

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the weights are their averages, rounded to their dtype; after it they are, bit
        for bit, what they were.

        Weights without an average stay as they are: all of them before the first step, which makes
        the averages. The values change in place; the weights themselves are kept meanwhile in
        memory of their size.

        Raises:
            RuntimeError: no group has ``ema_decay``; or step() or this method is called inside it,
                where the weights are not there.
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
        """Raises RuntimeError inside averaged_weights."""
        if self._swapped:
            raise RuntimeError("the weights are their averages: leave averaged_weights() first")
