"""Building a plan: check, fit the states, lay out the entries; publishing follows the first step.

Nothing of the optimizer is changed here, so that an error leaves it as it was.
"""

from __future__ import annotations

from .plan import Plan
from .plan_check import check_plan
from .plan_fit import fit_members
from .plan_layout import lay_out
from .plan_publish import make_publication
from .plan_request import PlanRequest
from .plan_validity import PlanValidity
from .state_tracking import Watch


def make_plan(request: PlanRequest) -> Plan:
    """The plan of a step.

    Raises:
        ValueError: a group option, parameter, gradient or state that no rule can work on; names it.
        RuntimeError: a sparse gradient, no backend for a device, or a CUDA graph is being captured.
        MemoryError: the host lacks the memory for paged states.
    """
    checked = check_plan(request)
    fitted = fit_members(request, checked.views)
    layout = lay_out(request, fitted, checked.backends)
    watch = Watch(request.forget)
    return Plan(
        request.members,
        layout,
        ranks=request.features.ranks,
        publication=make_publication(request, fitted, layout.rows, watch),
        validity=PlanValidity(request, watch),
        versioned=[
            one.view.version_holder() for one in fitted if not one.member.param.is_inference()
        ],
        watch=watch,
    )
