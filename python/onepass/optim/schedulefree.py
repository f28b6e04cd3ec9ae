"""The schedule-free AdamW optimizer."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from ..distributed.shards import full_weight
from ..engine.interrupts import Uninterrupted
from ..engine.state_conversion import from_bytes, to_bytes
from ..engine.state_layouts import COMPANIONS
from ..engine.tensor_access import is_dtensor
from ..rules.schedulefree import RULE
from .base import Optimizer
from .options import Options

_ASIDE = "train_"
"""The prefix of the state keys that hold the training weight and its companion in eval mode."""
_THEIRS = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""The keys of parameter groups of the package schedulefree that onepass stores per parameter."""


class AdamWScheduleFree(Optimizer):
    r"""AdamW without a learning rate schedule, as schedulefree.AdamWScheduleFree; step t from 1.

    The parameters are the training weights y during training, and the averages x in evaluation:

    .. math::
        \eta_t &= \eta \min(1, t / \text{warmup\_steps}), \quad
            w_t = t^r (\max_{i \le t} \eta_i)^p, \quad c_t = w_t / \textstyle\sum_{i \le t} w_i \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda y \\
        y &\leftarrow (1 - c_t) y + c_t z - \eta_t (1 - \beta_1 (1 - c_t)) u, \quad
        z \leftarrow z - \eta_t u \\
        x &= y + (1 - 1 / \beta_1) (z - y)

    With ``decoupled_weight_decay=False``, :math:`\lambda y` is added to :math:`g` instead of u.

    Call :meth:`eval` before the model is evaluated or its weights are saved for use, and
    :meth:`train` before the next step. A new optimizer is in train mode. Checkpoints resume bit for
    bit in both modes: save and load model and optimizer in the same mode.

    State: ``z``, which starts at the weight, and ``exp_avg_sq`` (v), each of the parameter's shape;
    the numbers ``step``, ``lr_max`` and ``weight_sum``, which is :math:`1 / c_t`. A step that is
    skipped, or in which the parameter has no gradient, does not change them. In eval mode also
    ``train_weight``, the bits of y. ``states="mx8"``, ``"mx4"`` and ``"dynamic8"`` store v in 8 or
    4 bits and z in fp32, because z is a weight; ``"bf16"`` stores both in bf16.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`\beta_1` in (0, 1), the share of x in y; :math:`\beta_2` in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        warmup_steps: steps over which the learning rate rises linearly, a whole number.
        r: power of the step in the weights of the average, from 0 to 100.
        weight_lr_power: p, from 0 to 100.
        foreach: accepted, as in every class.
        options: keyword-only, see :class:`Options`; ``decoupled_weight_decay`` is True by default.

    Raises:
        ValueError: an argument is out of range.

    Source: Defazio et al., "The road less scheduled" (2024).
    """

    rule = RULE
    decoupled = True

    def __init__(  # type: ignore[misc]  # schedulefree takes a shared option by position
        self,
        params: Any,
        lr: float | torch.Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "train_mode": True,
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    @property
    def training(self) -> bool:
        """Whether the optimizer is in train mode, so that a step can be taken."""
        return not self._groups_in(False)

    @torch.no_grad()
    def eval(self) -> None:
        """Replaces the parameters by their averages x, in place, rounded to the parameter's dtype.

        The bits of the training weights y are kept in ``state[param]["train_weight"]``, which takes
        as much memory as the weights; so are the bits of companions. Parameters without a state do
        not change. Does nothing in eval mode.

        Raises:
            RuntimeError: called inside :meth:`averaged_weights`.
        """
        self.check_swapped()
        done: list[torch.Tensor] = []
        with Uninterrupted():
            try:
                for group in self._groups_in(True):
                    for param in group["params"]:
                        if "z" in self.state.get(param, {}):
                            done.append(param)
                            self._average(param, 1.0 - 1.0 / float(group["betas"][0]))
            except BaseException:
                for param in done:
                    self._restore(param)
                raise
            for group in self._groups_in(True):
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Restores the bits of the training weights y that :meth:`eval` replaced.

        If there are none, because the state dict is one of schedulefree in eval mode, y is computed
        as ``x + (1 - beta1) (z - x)``. Does nothing in train mode.

        Raises:
            RuntimeError: called inside :meth:`averaged_weights`.
        """
        self.check_swapped()
        with Uninterrupted():
            for group in self._groups_in(False):
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "z" in state and not self._restore(param):
                        self._mix(param, 1.0 - float(group["betas"][0]))
                group["train_mode"] = True

    def check_ready(self) -> None:
        """Raises RuntimeError if a step cannot be taken, also in eval mode."""
        if not self.training:
            raise RuntimeError(
                "the optimizer is in eval mode, in which the parameters are averages: call "
                "optimizer.train() before step()"
            )
        super().check_ready()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, also one of schedulefree.AdamWScheduleFree; see the base class."""
        super().load_state_dict(_per_parameter(state_dict))

    def _groups_in(self, train_mode: bool) -> list[dict[str, Any]]:
        """The groups in train mode or in eval mode."""
        return [group for group in self.param_groups if bool(group["train_mode"]) is train_mode]

    def _average(self, param: torch.Tensor, share: float) -> None:
        """Keeps the training weight and its companion aside, and replaces the weight by x."""
        state = self.state[param]
        held = {_ASIDE + key: to_bytes(state[key]).clone() for key in COMPANIONS & state.keys()}
        state.update(held, **{_ASIDE + "weight": param.detach().clone()})
        self._mix(param, share)
        for key in COMPANIONS & state.keys():
            del state[key]  # it belongs to y

    def _mix(self, param: torch.Tensor, share: float) -> None:
        """Adds ``share`` times (z - param) to a parameter, in fp32."""
        state = self.state[param]
        full = full_weight(param, state)
        z = state["z"].to(device=param.device, dtype=torch.float32)
        param.copy_(full + share * (z - full))

    def _restore(self, param: torch.Tensor) -> bool:
        """Restores the training weight that was kept aside; False if there is none."""
        state = self.state[param]
        weight = state.pop(_ASIDE + "weight", None)
        for key in COMPANIONS:
            if _ASIDE + key in state:
                value = state.pop(_ASIDE + key)
                state[key] = value if is_dtensor(value) else from_bytes(value)
        if weight is not None:
            param.copy_(weight)
        return weight is not None


def _per_parameter(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the numbers that schedulefree stores in groups stored per parameter.

    schedulefree's ``weight_sum`` is the sum of the weights of all steps; onepass divides it by the
    weight of the last step. A state dict of onepass is returned as it is.
    """
    groups = state_dict["param_groups"]
    if not any("k" in group and "weight_sum" in group for group in groups):
        return state_dict
    state = dict(state_dict["state"])
    for group in groups:
        k, lr_max = int(group["k"]), max(float(group["lr_max"]), 0.0)
        last = float(k) ** float(group["r"]) * lr_max ** float(group["weight_lr_power"])
        numbers = {
            "step": torch.tensor(float(k)),
            "weight_sum": torch.tensor(float(group["weight_sum"]) / last if last else 0.0),
            "lr_max": torch.tensor(lr_max),
        }
        for key in group["params"]:
            if key in state:
                state[key] = {**state[key], **numbers}
    kept = [{k: v for k, v in group.items() if k not in _THEIRS} for group in groups]
    return {**state_dict, "state": state, "param_groups": kept}
