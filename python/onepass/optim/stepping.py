"""The step of an optimizer: planning, the norm pass, the update and its error handling."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from operator import attrgetter, is_
from typing import Any, ClassVar, Protocol

import torch

from ..distributed.device_plan import Moved
from ..distributed.param_ids import number_of
from ..engine import backends
from ..engine.change_record import ChangeRecord
from ..engine.hyper_table import capturing
from ..engine.interrupts import Uninterrupted
from ..engine.plan import Plan
from ..engine.plan_builder import make_plan
from ..engine.plan_request import Member, PlanRequest
from ..engine.state_tracking import Watch
from ..muon.batches import Settings
from ..paging.pager import Pager
from ..rules import Rule
from ..rules.option_checks import is_immutable
from .keywords import EACH_STEP
from .plan_features import Features
from .step_results import Findings

_each_step = attrgetter(*(keyword.attribute for keyword in EACH_STEP))


class Released(Protocol):
    """The interface of gradient release that a step uses; see :func:`onepass.release_gradients`."""

    def end_step(self, found: torch.Tensor | None = None) -> None:
        """Ends a step of the released parameters.

        Args:
            found: the result of :meth:`Plan.norm` for the parameters that are not released.
        """

    def forget_plan(self, watch: Watch, param: torch.Tensor) -> None:
        """Drops the plan of a parameter if the watch belongs to that plan."""


class Stepping(Findings):
    """Takes steps through a plan; the class :class:`Optimizer` adds options and checkpoints.

    Attributes:
        captured: plans, verdicts and memory that captured CUDA graphs use; they are kept alive
            because a graph may be replayed at any time.
        moved: see :data:`onepass.distributed.device_plan.Moved`.
        released: see :func:`onepass.release_gradients`.
        products: the options of Muon's products; None in other classes.
        changes: the record of changed weights; None without ``track_changes``.
    """

    rule: ClassVar[Rule]
    products: Settings | None = None
    backend: str | None
    max_grad_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    zero_grads: bool
    track_changes: bool = False
    changes: ChangeRecord | None = None
    norm_group: Any
    pager: Pager | None
    captured: list[Any]
    moved: Moved
    released: Released | None
    _policy: tuple[tuple[Any, ...], backends.Policy] | None = None  # checked values, their policy
    _found: torch.Tensor | None  # the result of measure(), for the next step
    _failed: str  # the reason why the last step failed halfway, or an empty string

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if an option of a group is out of range; names the option."""
        raise NotImplementedError

    def whole_step(self) -> None:
        """Runs the step with the current gradients, without a closure and without hooks."""
        self.check_ready()
        # torch.amp.GradScaler sets both attributes during a step.
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scaled = scale is not None or inf is not None
        plan = self.planned()
        try:
            if self.pager is not None:
                self.pager.discard()
                plan.start()
            policy = self.policy()
            if self.released is not None:
                if scaled:
                    raise RuntimeError(
                        "a GradScaler cannot be used with gradient release: the gradients have "
                        "been used and freed before its step()"
                    )
                # Only parameters of other models have gradients now.
                found = plan.norm(policy.largest) if self.max_grad_norm is not None else None
                with Uninterrupted():
                    self.take(plan, self.verdict, backends.NO_SWITCHES)
                    self._plan = plan
                    self.released.end_step(found)
                return
            found, self._found = self._found, None
            if found is None and policy.measures:
                found = plan.norm(policy.largest)
            with Uninterrupted():
                verdict = None
                if policy.measures or scaled:
                    verdict = self._judged(plan, found, scale, inf, policy)
                self.take(plan, verdict, self._switches())
                self._plan = plan
        finally:
            plan.forget_gradients()

    def _switches(self) -> backends.StepSwitches:
        """The booleans of the step, from the current options."""
        if not self.zero_grads:
            return backends.NO_SWITCHES
        return backends.StepSwitches(zero_grads=True)

    def take(
        self, plan: Plan, verdict: torch.Tensor | None, switches: backends.StepSwitches
    ) -> None:
        """Runs a planned step.

        An error before the first change leaves the optimizer unchanged. After a later error, the
        optimizer refuses further steps. The caller must defer SIGINT.
        """
        plan.stage(verdict)
        self._failed = "it was interrupted"
        try:
            plan.run(verdict, switches)
            self._adopt(plan)
            if verdict is not None:
                self.verdict = verdict
        except BaseException as error:
            self._plan = None
            self._failed = f"{type(error).__name__}: {error}" if plan.changed else ""
            raise
        self._failed = ""

    def check_ready(self) -> None:
        """Raises RuntimeError if a step cannot be taken."""
        self.check_swapped()
        self.check_failed()

    def check_failed(self) -> None:
        """Raises RuntimeError if an earlier step failed halfway."""
        if self._failed:
            raise RuntimeError(
                "an earlier step failed after it had changed some tensors, so weights and states "
                "are inconsistent: load a checkpoint of model and optimizer (load_state_dict), or "
                f"create a new optimizer. The error was: {self._failed}"
            )

    def judge(self, plan: Plan, found: torch.Tensor | None) -> None:
        """Computes the verdict for the next step; see :meth:`Plan.judge`."""
        self.verdict = self._judged(plan, found, None, None, self.policy())

    def _judged(
        self,
        plan: Plan,
        found: torch.Tensor | None,
        scale: torch.Tensor | None,
        inf: torch.Tensor | None,
        policy: backends.Policy,
    ) -> torch.Tensor:
        """See :meth:`Plan.judge`."""
        known = self.verdict
        if capturing():
            if known is None:
                raise RuntimeError(
                    "a captured step with clipping, unscaling or skipping needs a step before it "
                    "with the same option"
                )
            self.captured.append(known)
        return plan.judge(known, found, scale, inf, policy=policy, backend=self.backend)

    def planned(self) -> Plan:
        """The plan, with the current gradients stored in it.

        This is the plan of the last step unless that plan is stale; then a new plan is built, whose
        states are not yet published.
        """
        plan = self._plan
        if plan is None or not plan.refresh(self.param_groups, self.state):
            self._plan = plan = None  # frees the scratch memory of the old plan
            plan = self.new_plan([m for m in self.members() if m.param.grad is not None])
            if not plan.refresh(self.param_groups, self.state):
                raise RuntimeError("onepass: a tensor changed while the plan was built")
        plan.check_options(self.check_options)
        if capturing():
            self.captured += [plan, plan.memory()]
        return plan

    def adopted(self) -> Plan:
        """The plan with its states published; called outside of a step."""
        plan = self.planned()
        with Uninterrupted():
            self._adopt(plan)
            self._plan = plan
        return plan

    def _adopt(self, plan: Plan) -> None:
        """See :meth:`Plan.adopt`."""
        if not plan.adopted:
            self.state = plan.adopt(self.state)

    def new_plan(self, members: list[Member]) -> Plan:
        """Builds a plan without gradients; see :func:`onepass.engine.plan_builder.make_plan`.

        Args:
            members: parameters with gradients.
        """
        # The plan of a single released parameter does not depend on the other parameters.
        whole = self.released is None or len(members) != 1
        groups = self.param_groups if whole else [members[0].group]
        # States must be ordinary tensors, even if the step is called in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            features = Features(
                groups,
                members,
                whole,
                norm_group=self.norm_group,
                moved=self.moved,
                pager=self.pager,
                param_groups=self.param_groups,
                state=self.state,
                muon=self.products,
                later=None if self.released is None else self._trained,
            )
            request = PlanRequest(
                rule=self.rule,
                groups=groups,
                members=members,
                state=self.state,
                whole=whole,
                backend=self.backend,
                measured=self.measures,
                check_options=self.check_options,
                forget=_forgetting(weakref.ref(self), None if whole else members[0].param),
                settle=None if self.pager is None else self.pager.settle,
                features=features,
                record=self.changes,
            )
            return make_plan(request)

    def _trained(self) -> list[Member]:
        """All members that require a gradient."""
        return [member for member in self.members() if member.param.requires_grad]

    def forget_plan(self, watch: Watch, param: torch.Tensor | None) -> None:
        """Drops the plan of a watch: the plan of param, or the whole plan if param is None."""
        if param is not None and self.released is not None:
            self.released.forget_plan(watch, param)
        elif self._plan is not None and self._plan.watch is watch:
            self._plan = None

    def members(self) -> list[Member]:
        """All parameters with their groups and numbers."""
        owned = [(p, i, g) for i, g in enumerate(self.param_groups) for p in g["params"]]
        return [Member(p, number_of(p, at), i, g) for at, (p, i, g) in enumerate(owned)]

    def scratch(self) -> list[torch.Tensor]:
        """Memory that the optimizer keeps between steps besides states and tables."""
        return [] if self._plan is None else self._plan.scratch()

    def scratch_sizes(self, device: torch.device) -> list[int]:
        """The bytes of each tensor of :meth:`scratch` on a device, before the first step."""
        return []

    def policy(self) -> backends.Policy:
        """The clipping and skipping options, after a check of their values.

        Raises:
            ValueError: an option of the step is out of range.
        """
        values = _each_step(self)
        if self._policy is not None and all(map(is_, values, self._policy[0])):
            return self._policy[1]
        for keyword, value in zip(EACH_STEP, values, strict=True):
            keyword.check(keyword.name, value)
        largest = math.isinf(self.norm_type)
        policy = backends.Policy(self.max_grad_norm, largest, bool(self.skip_nonfinite))
        # The checks take as long as the sweep of a small plan: keep the result while the attributes
        # are the same immutable objects.
        self._policy = (values, policy) if is_immutable(values) else None
        return policy

    def measure(self) -> torch.Tensor | None:
        """Runs the norm pass over the gradients; the next step reuses the result.

        Returns:
            float64 [3] on the device of the first gradient: sum of squares, largest magnitude, and
            number of infinite or NaN elements. The gradients are not unscaled. None without
            gradients.
        """
        plan = self.adopted()
        self._found = plan.norm(self.policy().largest)
        plan.forget_gradients()
        return self._found


def _forgetting(
    reference: weakref.ref[Stepping], param: torch.Tensor | None
) -> Callable[[Watch], None]:
    """The callback of a watch, which makes the optimizer drop the watch's plan.

    Args:
        reference: weak reference to the optimizer.
        param: the parameter of the plan; None if the plan covers the whole optimizer.
    """

    def forget(watch: Watch) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.forget_plan(watch, param)

    return forget
