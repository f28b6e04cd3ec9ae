"""Builds a plan: checks the inputs, fits the states and lays out the entries.

Building does not change the optimizer, so an error leaves it unchanged. The new states are
published after the first step.
"""

from __future__ import annotations

from .plan import Plan
from .plan_check import check_plan
from .plan_fit import fit_members
from .plan_layout import lay_out
from .plan_publish import make_publication
from .plan_request import PlanRequest, Tally
from .plan_validity import PlanValidity
from .state_tracking import Watch


def make_plan(request: PlanRequest) -> Plan:
    """Builds the plan of a step.

    Raises:
        ValueError: a group option, parameter, gradient or state is not supported; the message names
            it.
        RuntimeError: a gradient is sparse, a device has no backend, or a CUDA graph is being
            captured.
        MemoryError: the host has too little free memory for paged states.
    """
    checked = check_plan(request)
    fitted = fit_members(request, checked.views)
    layout = lay_out(request, fitted, checked.backends)
    watch = Watch(request.forget)
    record = request.record
    tally = Tally() if record is None else record.begin(one.member.param for one in fitted)
    return Plan(
        request.members,
        layout,
        ranks=request.features.ranks,
        publication=make_publication(request, fitted, layout.rows, watch),
        validity=PlanValidity(request, watch),
        versioned=[
            one.view.version_holder() for one in fitted if not one.member.param.is_inference()
        ],
        tally=tally,
        watch=watch,
    )
