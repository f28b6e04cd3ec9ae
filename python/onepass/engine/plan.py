"""The plan: an optimizer's parameter list flattened once, and run at every step.

A step costs reading the gradients and comparing what is there with what the plan was built from:
identities in Python, addresses and layouts in the backend. If anything has changed (a parameter
without a gradient, a replaced state, a moved tensor, another option of a group), the plan is stale
and :mod:`onepass.engine.plan_builder` builds a new one.

Building a plan changes nothing: its new states become the optimizer's in :meth:`Plan.adopt`. A plan
refers neither to its optimizer nor to the dictionaries of the states, and its backends own no
parameter, so that torch can swap parameters and free what is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..numerics.verdict import VERDICT_WIDTH
from . import backends
from .device_plan import DevicePlan
from .hyper_table import TELEMETRY_WIDTH
from .plan_layout import PlanLayout
from .plan_publish import Publication
from .plan_request import Member, RankSums
from .plan_validity import PlanValidity
from .state_tracking import Watch
from .tensor_access import share_memory


def add_norms(parts: torch.Tensor) -> torch.Tensor:
    """What :meth:`Backend.norm` found of several lists, float64 [lists, 3], as of one."""
    total = parts.sum(0)
    total[1] = parts[:, 1].max()
    return total


class Plan:
    """An optimizer's groups, flattened; made by :func:`onepass.engine.plan_builder.make_plan`.

    Args:
        members: parameters with gradients.
        layout: their entries, by device and process groups.
        ranks: sums over ranks; None where there is one.
        publication: the states of the members.
        validity: what the plan was built from.
        versioned: tensors whose version counters are those of the parameters.
        watch: what the dictionaries of the states report to.

    Attributes:
        members, watch: as given.
        adopted: whether the plan's states are the optimizer's.
        changed: whether the last :meth:`run` may have changed anything.
    """

    def __init__(
        self,
        members: list[Member],
        layout: PlanLayout,
        *,
        ranks: RankSums | None,
        publication: Publication,
        validity: PlanValidity,
        versioned: list[torch.Tensor],
        watch: Watch,
    ) -> None:
        self.members, self.watch = members, watch
        self.adopted = self.changed = False
        self._parts, self._kinds, self._ranks = layout.parts, layout.groups, ranks
        self._publication: Publication | None = publication
        self._validity, self._versioned = validity, versioned

    def adopt(self, state: Any) -> Any:
        """Makes the plan's states and counters those of the optimizer, once.

        Args:
            state: ``optimizer.state``; its entries are changed in place.

        Returns:
            What ``optimizer.state`` has to be from now on.
        """
        if self._publication is not None:
            state = self._publication.publish(state)
            self._publication = None
        self.adopted = True
        return state

    def check_options(self, check: Callable[[Mapping[str, Any]], None]) -> None:
        """See :meth:`PlanValidity.check_options`."""
        self._validity.check_options(check)

    def refresh(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Takes the gradients; False, with nothing changed, if the plan is stale.

        Args:
            groups: ``optimizer.param_groups``.
            state: ``optimizer.state``.
        """
        if self.adopted and not self._validity.holds(groups, state):
            return False
        return all(part.refresh() for part in self._parts)

    def forget_gradients(self) -> None:
        """Lets go of the gradients that :meth:`refresh` has taken."""
        for part in self._parts:
            part.forget_gradients()

    def memory(self) -> list[torch.Tensor]:
        """The parameters' memory, as tensors that keep it: what a captured graph writes."""
        return [p.detach() for part in self._parts for p in part.params]

    def norm(self, largest: bool) -> torch.Tensor | None:
        """See :meth:`Backend.norm`, over all devices and ranks and on the first device; None
        without gradients.

        Args:
            largest: whether the norm that is wanted is the largest magnitude.
        """
        found = [part.norm() for part in self._parts]
        if self._ranks is not None:
            return self._ranks.norm(list(zip(self._kinds, found, strict=True)), largest)
        if len(found) < 2:
            return found[0] if found else None
        return add_norms(torch.stack([f.to(found[0].device, non_blocking=True) for f in found]))

    def judge(
        self,
        known: torch.Tensor | None,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        *,
        policy: backends.Policy,
        backend: str | None,
    ) -> torch.Tensor:
        """See :meth:`Backend.judge`; the verdict is on the first device.

        It is a new tensor unless it is on a GPU, where a captured graph goes on reading it.

        Args:
            known: the verdict of the step before, or None.
            found: of :meth:`norm`, or None.
            grad_scale, found_inf: torch.amp.GradScaler's, or None.
            policy: what is asked for.
            backend: name of the optimizer's backend, or None.
        """
        judging, device = self._judging(found if known is None else known, backend)
        if known is None:
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64, device=device)
        else:
            verdict = known.to(device, copy=device.type == "cpu")
        scale, inf = (
            None if t is None else t.to(device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        found = None if found is None else found.to(device)
        judging.judge(verdict, found, scale, inf, policy)
        return verdict

    def _judging(
        self, known: torch.Tensor | None, backend: str | None
    ) -> tuple[backends.Backend, torch.device]:
        """The backend and the device of verdicts; where there is nothing to step, too, since other
        ranks may have found something. known: a verdict or a norm, or None."""
        if self._parts:
            return self._parts[0].backend, self._parts[0].table.steps.device
        if known is None or known.device.type == "cpu":
            return backends.BACKENDS["reference"], torch.device("cpu")
        return backends.choose(known.device, backend), known.device

    def stage(self, verdict: torch.Tensor | None) -> None:
        """Derives the numbers of the next step that can fail; nothing is changed.

        Raises:
            ValueError: a step counter that is not a count.
        """
        for part in self._parts:
            part.stage(self._here(verdict, part))

    def start(self) -> int:
        """Starts to bring paged states to their devices; nothing is changed. Returns how many pages
        there are of them."""
        return sum(part.start() for part in self._parts)

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """The step, with the gradients that refresh has taken and the numbers that were staged.

        Args:
            verdict: of :meth:`judge`; None where nothing was asked.
            switches: the booleans of the step.
        """
        self.changed, zero_grads = False, switches.zero_grads
        grads = [grad for part in self._parts for grad in part.grads] if zero_grads else []
        # The sweep of one parameter would zero what that of another still has to read.
        together = zero_grads and share_memory(grads)
        if together:
            switches = replace(switches, zero_grads=False)
        for part in self._parts:
            try:
                part.run(self._here(verdict, part), switches)
            finally:
                self.changed = self.changed or part.changed
        if zero_grads:
            for part in self._parts:
                part.zero_gradients(swept=not together)
        # Kernels write behind autograd's back: it must still see that saved weights changed.
        torch.autograd.graph.increment_version(self._versioned)

    @staticmethod
    def _here(verdict: torch.Tensor | None, part: DevicePlan) -> torch.Tensor | None:
        device = part.table.steps.device
        return None if verdict is None else verdict.to(device, non_blocking=True)

    def telemetry(self, groups: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Of each group, its columns summed over rows and ranks, on the first device: see RowTable.

        Where parameters are sharded all ranks must ask."""
        device = self._parts[0].table.steps.device if self._parts else torch.device("cpu")
        shape = len(groups), TELEMETRY_WIDTH
        parts = []
        for kind, part in zip(self._kinds, self._parts, strict=True):
            sums, found = (
                torch.zeros(shape, dtype=torch.float64, device=device),
                part.table.telemetry,
            )
            for i, row in enumerate(part.table.rows):
                number = next(n for n, group in enumerate(groups) if group is row.group)
                if found is not None:
                    sums[number] += found[i].to(device)
            parts.append((kind, sums))
        if self._ranks is not None:
            return list(self._ranks.sums(parts, shape).unbind())
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        return list(sum((sums for _, sums in parts), total).unbind())
