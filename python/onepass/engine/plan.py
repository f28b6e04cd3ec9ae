"""The plan: an optimizer's parameter list, flattened once and run at every step.

Each step reads the gradients and checks that the plan is not stale. Python compares object
identities; the backend compares addresses and layouts. The plan is stale if a gradient is missing,
a state was replaced, a tensor moved or a group option changed. In that case
:mod:`onepass.engine.plan_builder` builds a new plan.

Building a plan does not change the optimizer; :meth:`Plan.adopt` publishes the new states. A plan
holds no reference to its optimizer or to the state dictionaries, and its backends own no parameter,
so torch can swap parameters and free replaced tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..numerics.verdict import VERDICT_WIDTH
from . import backends
from .device_plan import DevicePlan
from .hyper_table import TELEMETRY_WIDTH
from .plan_layout import PlanLayout
from .plan_publish import Publication
from .plan_request import Member, RankSums, Tally
from .plan_validity import PlanValidity
from .state_tracking import Watch
from .tensor_access import share_memory


def add_norms(parts: torch.Tensor) -> torch.Tensor:
    """Combines results of :meth:`Backend.norm` for several lists, float64 [lists, 3], into one."""
    total = parts.sum(0)
    total[1] = parts[:, 1].max()
    return total


class Plan:
    """An optimizer's groups, flattened; made by :func:`onepass.engine.plan_builder.make_plan`.

    Args:
        members: parameters with gradients.
        layout: the entries of the members, by device and process groups.
        ranks: sums over ranks; None for a single rank.
        publication: the states of the members.
        validity: the groups and states that the plan was built from.
        versioned: tensors that share the version counters of the parameters.
        tally: counts the increments of these counters.
        watch: receives the change reports of the state dictionaries.

    Attributes:
        members, watch: as given.
        adopted: whether the plan's states are published in the optimizer.
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
        tally: Tally,
        watch: Watch,
    ) -> None:
        self.members, self.watch = members, watch
        self.adopted = self.changed = False
        self._parts, self._kinds, self._ranks = layout.parts, layout.groups, ranks
        self._publication: Publication | None = publication
        self._validity, self._versioned, self._tally = validity, versioned, tally

    def adopt(self, state: Any) -> Any:
        """Publishes the plan's states and counters in the optimizer; later calls do nothing.

        Args:
            state: ``optimizer.state``; its entries are changed in place.

        Returns:
            The new value of ``optimizer.state``.
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
        """Reads the gradients; returns False and changes nothing if the plan is stale.

        Args:
            groups: ``optimizer.param_groups``.
            state: ``optimizer.state``.
        """
        if self.adopted and not self._validity.holds(groups, state):
            return False
        return all(part.refresh() for part in self._parts)

    def forget_gradients(self) -> None:
        """Drops the references to gradients that :meth:`refresh` stored."""
        for part in self._parts:
            part.forget_gradients()

    def memory(self) -> list[torch.Tensor]:
        """Tensors that keep the parameters' memory alive, which a captured graph writes."""
        return [p.detach() for part in self._parts for p in part.params]

    def scratch(self) -> list[torch.Tensor]:
        """See :meth:`DevicePlan.scratch`."""
        return [tensor for part in self._parts for tensor in part.scratch()]

    def norm(self, largest: bool) -> torch.Tensor | None:
        """The result of :meth:`Backend.norm` over all devices and ranks, on the first device.

        Args:
            largest: whether the caller needs the largest magnitude over all ranks.

        Returns:
            float64 [3]; None without gradients.
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
        """Computes the verdict of the step on the first device; see :meth:`Backend.judge`.

        On the CPU the verdict is a new tensor. On a GPU an existing verdict is updated in place,
        because captured graphs read it.

        Args:
            known: the verdict of the previous step, or None.
            found: the result of :meth:`norm`, or None.
            grad_scale, found_inf: the tensors of torch.amp.GradScaler, or None.
            policy: the clipping and skipping options.
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
        """The backend and the device of verdicts.

        A rank without gradients also computes a verdict, because other ranks may have gradients.

        Args:
            known: a verdict or a norm, or None; its device is used if there are no gradients.
        """
        if self._parts:
            return self._parts[0].backend, self._parts[0].table.steps.device
        if known is None or known.device.type == "cpu":
            return backends.BACKENDS["reference"], torch.device("cpu")
        return backends.choose(known.device, backend), known.device

    def stage(self, verdict: torch.Tensor | None) -> None:
        """Computes the values of the next step that can raise; nothing is changed.

        Args:
            verdict: the result of :meth:`judge`; None if the step has no verdict.

        Raises:
            ValueError: a step counter is not a whole number in [0, 2^53).
        """
        for part in self._parts:
            part.stage(self._here(verdict, part))

    def start(self) -> int:
        """Starts to copy paged states to their devices; returns the number of pages."""
        return sum(part.start() for part in self._parts)

    def run(self, verdict: torch.Tensor | None, switches: backends.StepSwitches) -> None:
        """Runs the step with the gradients from :meth:`refresh` and the values from :meth:`stage`.

        Args:
            verdict: the result of :meth:`judge`; None if the step has no verdict.
            switches: the booleans of the step.
        """
        self.changed, zero_grads = False, switches.zero_grads
        grads = [grad for part in self._parts for grad in part.grads] if zero_grads else []
        # Gradients that share memory are zeroed after all sweeps: a sweep must not zero a gradient
        # that another sweep still reads.
        together = zero_grads and share_memory(grads)
        if together:
            switches = switches._replace(zero_grads=False)
        for part in self._parts:
            try:
                part.run(self._here(verdict, part), switches)
            finally:
                self.changed = self.changed or part.changed
        if zero_grads:
            for part in self._parts:
                part.zero_gradients(swept=not together)
        # Kernels bypass autograd: increment the versions so that it detects changed weights.
        torch.autograd.graph.increment_version(self._versioned)
        self._tally.count += 1

    @staticmethod
    def _here(verdict: torch.Tensor | None, part: DevicePlan) -> torch.Tensor | None:
        """The verdict on the device of a part."""
        device = part.table.steps.device
        return None if verdict is None else verdict.to(device, non_blocking=True)

    def telemetry(self, groups: list[dict[str, Any]]) -> list[torch.Tensor]:
        """The telemetry columns of each group, summed over rows and ranks, on the first device.

        A collective call if parameters are sharded: all ranks must call it.

        Args:
            groups: ``optimizer.param_groups``.

        Returns:
            float64 [TELEMETRY_WIDTH] for each group; see :class:`RowTable`.
        """
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
