"""Checks before a plan is built: graph capture, options, parameters, gradients, backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..rules.group_options import option
from . import backends
from .hyper_table import capturing
from .plan_request import Member, ParamView, PlanRequest
from .validation import check_tensors, check_weight_format


class Checked(NamedTuple):
    """The results of the checks that plan building needs.

    Attributes:
        views: the view of each member, in the members' order.
        backends: the backend of each device.
    """

    views: list[ParamView]
    backends: dict[torch.device, backends.Backend]


def check_plan(request: PlanRequest) -> Checked:
    """Checks the inputs of a plan; nothing is changed.

    Raises:
        ValueError: a group option, parameter or gradient is not supported; the message names it.
        RuntimeError: a gradient is sparse, a device has no backend, or a CUDA graph is being
            captured.
    """
    if capturing() and any(member.param.is_cuda for member in request.members):
        raise RuntimeError(
            "a captured step needs a step before it with the same parameters, states and "
            "gradients: building a plan waits for the device, which a capture does not allow"
        )
    request.features.place_states()
    for group in request.groups:
        request.check_options(group)
    views = [request.features.view(member.param) for member in request.members]
    for member, view in zip(request.members, views, strict=True):
        _check_member(member, view)
    return Checked(views, _choose_backends(request, views))


def _check_member(member: Member, view: ParamView) -> None:
    """Raises if a parameter or its gradient is not supported."""
    which = member.name
    param, grad = view.check(which)
    check_tensors(param, grad, which)
    check_weight_format(param, option(member.group, "weights"), which)


def _choose_backends(
    request: PlanRequest, views: list[ParamView]
) -> dict[torch.device, backends.Backend]:
    """The backend of each device."""
    devices = dict.fromkeys(view.local.device for view in views)
    return {device: backends.choose(device, request.backend, request.rule) for device in devices}
