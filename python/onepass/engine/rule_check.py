"""Compares the NumPy and the Triton functions of a custom rule."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.custom import VALUES, Rule, check_definition, variants_of
from .backends import BACKENDS, Backend, Entry, StepArgs
from .hyper_table import History, RowTable

STEPS = 3
_EXTRA = np.array([np.inf, -np.inf, np.nan, 3e38, -1e-45, 1e-12], np.float32)
_ODD = np.concatenate([VALUES, _EXTRA])


def check_rule(rule: Rule, device: str | torch.device | None = None) -> None:
    """Checks a custom rule, and that its NumPy and Triton functions return the same bits.

    Both run three steps from every pair of odd weights and gradients (zeros, denormals, infinities,
    NaN, large values), with every combination of flags that the rule accepts. The bits of weights,
    states, scalar states and hyperparameters are compared after each step; NaNs count as equal.

    Args:
        rule: a custom rule. Without Triton functions only its definition is checked.
        device: where Triton runs. By default the current GPU, or the CPU if TRITON_INTERPRET=1 was
            set before Python started.

    Raises:
        ValueError: the definition is inconsistent, or results differ. The message names the
            variant, the step, the tensor, and the first element with its input and both results.
        RuntimeError: the rule has Triton functions, but Triton cannot run here.
    """
    check_definition(rule)
    if rule.triton_update is None:
        return
    triton, reference = BACKENDS["triton"], BACKENDS["reference"]
    if device is None:
        interpreted = not triton.unavailable(torch.device("cpu"))
        device = "cpu" if interpreted or not torch.cuda.is_available() else "cuda"
    device = torch.device(device)
    if why_not := triton.unavailable(device):
        raise RuntimeError(f"check_rule cannot run Triton on {device}: {why_not}")
    for bits, variant in variants_of(rule):
        group = {**variant, "weight_decay": 0.1}
        ours = _Run(rule, group, bits, triton, device)
        theirs = _Run(rule, group, bits, reference, torch.device("cpu"))
        _compare(rule, bits, ours, theirs)


class _Run:
    """Steps of a rule over the odd values on one backend.

    Args:
        rule: the rule.
        group: a parameter group.
        bits: the flags of the group.
        backend: the backend.
        device: the device of the tensors.
    """

    def __init__(
        self, rule: Rule, group: dict[str, Any], bits: int, backend: Backend, device: torch.device
    ) -> None:
        pairs = np.array(list(itertools.product(_ODD, _ODD)), np.float32)
        self.rule, self.backend, self.device = rule, backend, device
        self.param, self.grad = (torch.from_numpy(a.copy()).to(device) for a in pairs.T)
        self.states = {
            slot: self.param.clone()
            if rule.kind_of(key) == "weight"
            else torch.full_like(self.param, rule.initial_value(key, group))
            for slot, key in rule.state_slots(bits)
        }
        start = History(0.0, True, tuple(s.starts_at for s in rule.scalar_states))
        self.table = RowTable(rule, [(group, start)], device)
        native = WEIGHT_FORMATS["native"].codes[torch.float32]
        entry = Entry(self.param, self.states, STATE_FORMATS["fp32"], native, rule, bits, 0, 0)
        self.prepared = backend.prepare([entry])

    def step(self) -> None:
        """Takes one step with the same gradients."""
        if not self.backend.refresh(self.prepared, [self.param], [self.grad]):
            raise RuntimeError("onepass: a tensor of check_rule moved")
        staged = self.backend.stage(self.table, None)
        self.backend.advance(self.table, None, staged)
        self.backend.run(self.prepared, StepArgs(self.table.hyper, self.table.counters))
        self.backend.count(self.table, staged)

    def results(self) -> dict[str, np.ndarray[Any, Any]]:
        """Name -> values after the last step."""
        found = {"hyperparameters": self.table.hyper[0], "scalar states": self.table.scalar_states}
        found |= {self.rule.keys[slot]: state for slot, state in self.states.items()}
        found["the weight"] = self.param
        return {name: value.cpu().numpy().ravel() for name, value in found.items()}


def _compare(rule: Rule, bits: int, ours: _Run, theirs: _Run) -> None:
    """Raises ValueError where the results of two runs differ."""
    flags = sorted(rule.flag_names(bits))
    which = f"rule {rule.name!r}" + (f" with flags {', '.join(flags)}" if flags else "")
    before = (theirs.param.clone(), theirs.grad)
    for number in range(1, STEPS + 1):
        ours.step()
        theirs.step()
        expected = theirs.results()
        for name, found in ours.results().items():
            want = expected[name]
            same = (found.view(np.int32) == want.view(np.int32)) | (
                np.isnan(found) & np.isnan(want)
            )
            if not same.all():
                i = int(np.argmin(same))
                where = f"element {i}"
                if len(found) == len(before[0]):
                    where = f"weight {before[0][i]:g} and gradient {before[1][i]:g}"
                raise ValueError(
                    f"{which}: {name} of step {number} differs for {where}: {found[i]:.9g} in "
                    f"Triton, {want[i]:.9g} in NumPy ({int((~same).sum())} of {len(same)} differ)"
                )
