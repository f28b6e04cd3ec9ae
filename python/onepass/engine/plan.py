"""The plan: an optimizer's parameter list flattened once, and the checks that keep it true.

A step costs reading the gradients and comparing what is there with what the plan was built from:
identities in Python, addresses and layouts in the backend. If anything has changed (a parameter
without a gradient, a replaced state, a moved tensor, another option of a group), the plan is stale
and :mod:`onepass.engine.plan_builder` builds a new one.

Building a plan changes nothing: its new states become the optimizer's in :meth:`Plan.adopt`. A plan
refers neither to its optimizer nor to the dictionaries of the states, and its backends own no
parameter, so that torch can swap parameters and free what is replaced.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..distributed.rank_sums import Groups, Ranks
from ..formats import scale_key
from ..numerics.verdict import VERDICT_WIDTH
from ..rules import Rule
from ..rules.group_options import option
from . import backends
from .comparisons import is_fixed, options_of, same, values_of
from .device_plan import Part
from .hyper_table import TELEMETRY_WIDTH, Row, capturing
from .state_conversion import stale_keys
from .state_tracking import OptimizerState, PagedState, ParamState, Watch
from .tensor_access import share_memory

if TYPE_CHECKING:
    from ..optim.stepping import Stepping


class Member(NamedTuple):
    """A parameter of an optimizer.

    Attributes:
        param: the tensor.
        number: keys its random bits: its position in the optimizer, unless it was given one.
        at, group: its group, and the position of that.
    """

    param: torch.Tensor
    number: int
    at: int
    group: dict[str, Any]


def add_norms(parts: torch.Tensor) -> torch.Tensor:
    """What :meth:`Backend.norm` found of several lists, float64 [lists, 3], as of one."""
    total = parts.sum(0)
    total[1] = parts[:, 1].max()
    return total


def group_options(rule: Rule, group: dict[str, Any]) -> tuple[Any, ...]:
    """What entries are made from; the other options are read at every step."""
    return (
        rule.flag_bits(group),
        option(group, "states"),
        option(group, "weights"),
        option(group, "ema_decay") is None,
        len(group["params"]),
    )


class Made(NamedTuple):
    """What a parameter's entry of ``optimizer.state`` becomes when the plan is adopted.

    Attributes:
        param: the parameter.
        held: state key -> tensor, but for the step counter.
        row: that has the counter.
    """

    param: torch.Tensor
    held: dict[str, Any]
    row: Row


class Plan:
    """An optimizer's groups, flattened; made by :func:`onepass.engine.plan_builder.make_plan`.

    Args:
        rule: of the optimizer.
        groups: that the plan looks at.
        members: parameters with gradients.
        whole: whether these are all; a plan of one parameter, of gradients that are released, does
            not look at the others.
        parts: by device and process groups.
        kinds: of each part, the process groups that its parameters are cut over.
        ranks: sums over ranks; None where there is one.
        made: the states of the members.
        versioned: tensors whose version counters are those of the parameters.
        watch: what the dictionaries of the states report to.

    Attributes:
        members, watch: as given.
        adopted: whether the plan's states are the optimizer's.
        changed: whether the last :meth:`run` may have changed anything.
    """

    def __init__(
        self,
        rule: Rule,
        groups: list[dict[str, Any]],
        members: list[Member],
        whole: bool,
        *,
        parts: list[Part],
        kinds: list[Groups],
        ranks: Ranks | None,
        made: list[Made],
        versioned: list[torch.Tensor],
        watch: Watch,
    ) -> None:
        self.members, self.watch = members, watch
        self.adopted = self.changed = False
        self._rule, self._groups, self._whole = rule, groups, whole
        self._parts, self._kinds, self._ranks = parts, kinds, ranks
        self._made, self._versioned = made, versioned
        self._active = [member.param for member in members]
        active = set(self._active)
        self._params = [list(group["params"]) for group in groups] if whole else []
        self._idle = [p for params in self._params for p in params if p not in active]
        self._options = [group_options(rule, group) for group in groups]
        self._checked: list[Any] | None = None

    def adopt(self, optimizer: Stepping) -> None:
        """Makes the plan's states and counters those of the optimizer.

        The optimizer then has them in ``optimizer.state``, and drops the plan when one of them is
        replaced or removed there.
        """
        if self.adopted:
            return
        for param, held, row in self._made:
            state = optimizer.state[param]
            if not isinstance(state, ParamState):
                state = optimizer.state[param] = ParamState(state)
            # Scales and companions of a format that the group no longer has.
            for stale in stale_keys(state, held, self._rule):
                del state[stale]
            state.update(held, step=row.step, **row.scalar_states)
            state.fresh, state.watch = row.fresh, self.watch
            state.begun = ()
            if self._rule.needs_first:
                keys = self._rule.keys
                state.begun = (*keys, *map(scale_key, keys))
        if self._whole:
            if optimizer.pager is not None and not isinstance(optimizer.state, PagedState):
                optimizer.state = PagedState(optimizer.pager.settle, optimizer.state)
            elif not isinstance(optimizer.state, OptimizerState):
                optimizer.state = OptimizerState(optimizer.state)
            optimizer.state.watch = self.watch
        self._made = []
        self.adopted = True

    def check_options(self, optimizer: Stepping) -> None:
        """Raises ValueError for an option that is out of range; each value is looked at once."""
        if self._checked is None:
            for group in self._groups:
                optimizer.check_options(group)
            if self._whole and all(map(is_fixed, options_of(self._groups))):
                self._checked = list(values_of(self._groups))

    def _unchanged(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups hold the very objects that were checked, all of them immutable."""
        known = self._checked
        return (
            known is not None
            and sum(map(len, groups)) == len(known)
            and same(values_of(groups), known)
        )

    def _holds(self, optimizer: Stepping) -> bool:
        """Whether groups, states and the parameters without a gradient are what they were."""
        groups = optimizer.param_groups if self._whole else self._groups
        if not self._unchanged(groups):
            self._checked = None
            if [group_options(self._rule, group) for group in groups] != self._options:
                return False
        state = optimizer.state if self._whole else dict.get(optimizer.state, self._active[0])
        if getattr(state, "watch", None) is not self.watch or not self.watch.same:
            return False
        if not self._whole:
            return True
        if len(groups) != len(self._params) or not all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(groups, self._params, strict=True)
        ):
            return False
        self._groups = groups
        return all(p.grad is None for p in self._idle)

    def refresh(self, optimizer: Stepping) -> bool:
        """Takes the gradients; False, with nothing changed, if the plan is stale."""
        if self.adopted and not self._holds(optimizer):
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
        optimizer: Stepping,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: backends.Policy,
    ) -> torch.Tensor:
        """See :meth:`Backend.judge`; the verdict is on the first device.

        It is a new tensor unless it is on a GPU, where a captured graph goes on reading it.
        """
        known = optimizer.verdict
        backend, device = self._judging(optimizer, found)
        if capturing():
            if known is None:
                raise RuntimeError("a step that is captured needs one before it that judges as it")
            optimizer.captured.append(known)
        if known is None:
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64, device=device)
        else:
            verdict = known.to(device, copy=device.type == "cpu")
        scale, inf = (
            None if t is None else t.to(device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        found = None if found is None else found.to(device)
        backend.judge(verdict, found, scale, inf, policy)
        return verdict

    def _judging(
        self, optimizer: Stepping, found: torch.Tensor | None
    ) -> tuple[backends.Backend, torch.device]:
        """The backend and the device of verdicts; where there is nothing to step, too, since other
        ranks may have found something."""
        if self._parts:
            return self._parts[0].backend, self._parts[0].table.steps.device
        known = found if optimizer.verdict is None else optimizer.verdict
        if known is None or known.device.type == "cpu":
            return backends.BACKENDS["reference"], torch.device("cpu")
        return backends.choose(known.device, optimizer.backend), known.device

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

    def run(self, verdict: torch.Tensor | None, zero_grads: bool) -> None:
        """The step, with the gradients that refresh has taken and the numbers that were staged."""
        self.changed = False
        grads = [grad for part in self._parts for grad in part.grads] if zero_grads else []
        # The sweep of one parameter would zero what that of another still has to read.
        together = zero_grads and share_memory(grads)
        for part in self._parts:
            try:
                part.run(self._here(verdict, part), zero_grads and not together)
            finally:
                self.changed = self.changed or part.changed
        if zero_grads:
            for part in self._parts:
                part.zero_gradients(swept=not together)
        # Kernels write behind autograd's back: it must still see that saved weights changed.
        torch.autograd.graph.increment_version(self._versioned)

    @staticmethod
    def _here(verdict: torch.Tensor | None, part: Part) -> torch.Tensor | None:
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
