"""Gradient release: each parameter is updated in the backward pass, once its gradient is ready."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from ..distributed.shards import shards_of
from ..engine.backends import NO_SWITCHES
from ..engine.interrupts import Uninterrupted
from ..engine.plan import Plan, add_norms
from ..engine.state_tracking import Watch
from ..paging.pager import Pager
from . import Optimizer
from .base import own_optimizer


def release_gradients(
    model: torch.nn.Module, optimizer: Optimizer, *, clip_by_previous_norm: bool = False
) -> ReleasedGradients:
    """Makes the backward pass update the parameters of a model and free their gradients.

    Each parameter is updated once its gradient is accumulated, and the gradient is then freed. Only
    the gradients that the backward pass is working on exist at the same time. The result bits equal
    those of an ordinary step. ``optimizer.step()`` updates the optimizer's other parameters and
    ends the step. The call is optional without ``clip_by_previous_norm``.

    torch.amp.GradScaler is not supported, because it checks the gradients after the backward pass.

    Args:
        model: the model whose parameters are released, as far as the optimizer has them.
        optimizer: the optimizer; parameters and states are updated in place.
        clip_by_previous_norm: with ``max_grad_norm``, clip by the global norm of the *previous*
            step's gradients, because the norm of this step is known only after the last update. The
            first step is not clipped, and a sudden large gradient is clipped one step late. The
            option is explicit because the results differ from ordinary clipping.

    Returns:
        A handle with :meth:`~ReleasedGradients.paused` for micro-batches that only accumulate, and
        :meth:`~ReleasedGradients.remove` to end gradient release.

    Raises:
        ValueError: ``max_grad_norm`` without ``clip_by_previous_norm`` or the reverse;
            ``skip_nonfinite`` or ``telemetry``, which need all gradients of a step;
            :class:`onepass.Muon`, which orthogonalises matrices in batches; a DTensor; a model
            without parameters of the optimizer; an optimizer that is already released.

    Source: Lv et al., "Full parameter fine-tuning for large language models with limited resources"
    (LOMO, 2023), for SGD; here for every rule.
    """
    optimizer = own_optimizer(optimizer)
    _check_options(optimizer, clip_by_previous_norm)
    return ReleasedGradients(model, optimizer)


def _check_options(optimizer: Optimizer, clip_by_previous_norm: bool) -> None:
    """Raises ValueError if gradient release does not support the optimizer."""
    if optimizer.products is not None:
        raise ValueError(
            "gradient release does not support Muon: it orthogonalises the matrices of all "
            "parameters in batches, so a step needs all gradients at once"
        )
    if optimizer.max_grad_norm is not None and not clip_by_previous_norm:
        raise ValueError(
            "max_grad_norm needs all gradients of a step, but gradient release frees each gradient "
            "at once: use clip_by_previous_norm=True to clip by the norm of the previous step"
        )
    if optimizer.max_grad_norm is None and clip_by_previous_norm:
        raise ValueError("clip_by_previous_norm=True needs an optimizer with max_grad_norm")
    for name, value in (
        ("skip_nonfinite", optimizer.skip_nonfinite),
        ("telemetry", optimizer.measures),
    ):
        if value:
            raise ValueError(
                f"{name} needs all gradients of a step, so it cannot be combined with gradient "
                "release: turn it off"
            )
    if shards_of(p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "gradient release does not support DTensor parameters: FSDP2 frees their gradients "
            "itself"
        )
    if optimizer.released is not None:
        raise ValueError(
            "optimizer already releases its gradients: call remove() on its handle first"
        )


class ReleasedGradients:
    """The handle of :func:`release_gradients`."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._paused = False
        self._plans: dict[torch.Tensor, Plan] = {}
        # Gradients of several devices arrive on several threads.
        self._lock = threading.Lock()
        # The parameters that this step has updated, and the results of their norm passes.
        self._stepped: dict[torch.Tensor, None] = {}
        self._found: list[torch.Tensor] = []
        # Parameter -> the parameter that the previous step updated after it.
        self._next: dict[torch.Tensor, torch.Tensor] = {}
        own = set(model.parameters())
        self._members = {m.param: m for m in optimizer.members() if m.param in own}
        if not self._members:
            raise ValueError("model must have a parameter of the optimizer; it has none")
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for param in self._members
        ]
        self._settle()
        optimizer.released = self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which gradients only accumulate; the next backward pass uses them."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def remove(self) -> None:
        """Ends gradient release: gradients are kept for ``optimizer.step()`` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._plans = {}
        self._settle()
        self._optimizer.released = None

    def _settle(self) -> None:
        """Waits for paged states that are being copied."""
        # The next plans use other ring buffers than the current plans.
        if self._optimizer.pager is not None:
            self._optimizer.pager.settle()

    @torch.no_grad()
    def _arrived(self, param: torch.Tensor) -> None:
        """The autograd hook: updates a parameter and frees its gradient."""
        if self._paused:
            return
        optimizer = self._optimizer
        with self._lock:
            optimizer.check_ready()
            if param in self._stepped:
                self.end_step()  # a new backward pass has begun without a call of step()
            plan = self._plans.get(param)
            groups, state = optimizer.param_groups, optimizer.state
            if plan is None or not plan.refresh(groups, state):
                plan = optimizer.new_plan([self._members[param]])
                plan.refresh(groups, state)
            optimizer.check_options(plan.members[0].group)
            plan.start()
            found = None
            if optimizer.max_grad_norm is not None:
                found = plan.norm(optimizer.policy().largest)
            with Uninterrupted():
                optimizer.take(plan, optimizer.verdict, NO_SWITCHES)
                self._plans[param] = plan
                plan.forget_gradients()
                if found is not None:
                    self._found.append(found)
                self._stepped[param] = None
                param.grad = None
            if optimizer.pager is not None:
                self._start_next(optimizer.pager, param)

    def forget_plan(self, watch: Watch, param: torch.Tensor) -> None:
        """Drops the plan of a parameter if the watch belongs to that plan."""
        plan = self._plans.get(param)
        if plan is not None and plan.watch is watch:
            del self._plans[param]

    def _start_next(self, pager: Pager, param: torch.Tensor) -> None:
        """Starts to copy the states of the parameters that followed this one in the previous step.

        The copies overlap with the backward pass.
        """
        pages = 0
        while pages < pager.paging.buffers - 1 and (following := self._next.get(param)) is not None:
            plan = self._plans.get(following)
            pages += plan.start() if plan is not None else 0
            param = following

    def end_step(self, found: torch.Tensor | None = None) -> None:
        """Ends the step; its norm clips the next step.

        Args:
            found: the result of :meth:`Plan.norm` for the parameters that are not released.
        """
        if found is not None:
            self._found.append(found)
        if self._found and self._plans:
            device = self._found[0].device
            parts = torch.stack([found.to(device, non_blocking=True) for found in self._found])
            self._optimizer.judge(next(iter(self._plans.values())), add_norms(parts))
        if self._optimizer.pager is not None:
            self._optimizer.pager.discard()
            order = list(self._stepped)
            self._next = dict(pairwise(order))
        self._stepped.clear()
        self._found = []

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer with gradient release cannot be copied or pickled, because it holds "
            "hooks: call remove() on its handle first"
        )
