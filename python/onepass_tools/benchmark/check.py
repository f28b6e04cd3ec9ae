"""Checks two steps of a provider against the float64 specification of the rule.

The specification is ``derive`` and ``update`` of the rule (onepass/rules). tests/test_oracle.py
compares the specification with independently written formulas, and these with torch.optim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from onepass.rules import StepOf

from .cases import DTYPES, OPTIONS, Case, class_of, group_of

Tensor = torch.Tensor

SAMPLED = 1 << 20
"""About this many elements of a list are compared, or all if the list has fewer."""
STEPS = 2
COARSE = {"mx8": 0.25, "dynamic8": 0.25, "mx4": 2.0}
"""The allowed error of a weight's change with coarse states, as a fraction of the change.
Neighbouring codes of mx8 differ by an eighth of the value, those of mx4 by a half, and both moments
of an element are rounded."""
SECOND = -0.5
"""The second gradient divided by the first, an exact factor. With equal gradients Adam's update
would not depend on its betas."""
OTHER_CODES = 0.01
"""The fraction of elements that may exceed all limits for a provider with 8- or 4-bit codes of its
own, because other codes lose other small elements of a block."""
BLOCKS = {"dynamic8": 256, "mx8": 32}
"""The number of elements that share a scale."""
SMALL = 2**-7
"""Below this fraction of the block maximum, the mx8 codes of a first moment are evenly spaced, an
eighth of EVEN times the block maximum apart."""
EVEN = 2**-14
"""An upper bound of the lowest power of two in the block, as a fraction of the block maximum."""
FLOOR = 2**-29
"""An upper bound of the lowest mx8 code of a second moment, as a fraction of the block maximum."""
LOWEST = 0.325e-6
"""The lowest positive value of dynamic8's map of second moments, as a fraction of the block
maximum: the centre of the lower half of the lowest decade, 1e-7 to 1e-6."""


def exact_step(
    rule: str, weights: Tensor, grad: Tensor, number: int, states: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of the specification in float64.

    Args:
        rule: a key of OPTIONS.
        weights: float64; not changed.
        grad: float64; not changed.
        number: the number of the step, counted from 1.
        states: float64; not changed. One tensor for each state that exists with the options of the
            rule, in the order of the rule's slots.

    Returns:
        (weights, states) after the step.
    """
    found, group = class_of(rule).rule, group_of(rule)
    bits, options = found.flag_bits(group), found.options_row(group)
    scalar_states = tuple(state.starts_at for state in found.scalar_states)
    for step in range(1, number + 1):
        scalar_states = found.advance(options, step, scalar_states)
    scalars = found.derive(options, StepOf(number, number == 1, scalar_states))
    slots = [slot for slot, _ in found.state_slots(bits)]
    arrays: list[Any] = [None] * len(found.slots)
    for slot, state in zip(slots, states, strict=True):
        arrays[slot] = state.cpu().numpy()
    # update is annotated for fp32 arrays, but computes in the dtype of its arguments.
    update: Any = found.update
    with np.errstate(all="ignore"):  # the bounds below use infinite moments
        after, arrays = update(
            weights.cpu().numpy(), grad.cpu().numpy(), arrays, scalars, found.flag_names(bits)
        )
    after, *kept = (torch.from_numpy(x) for x in (after, *(arrays[slot] for slot in slots)))
    return after.to(weights.device), [state.to(weights.device) for state in kept]


def initial_states(rule: str, like: Tensor) -> list[Tensor]:
    """The states before the first step, in the form that :func:`exact_step` takes.

    Args:
        rule: a key of OPTIONS.
        like: the weights before the first step.
    """
    found, group = class_of(rule).rule, group_of(rule)
    keys = [key for _, key in found.state_slots(found.flag_bits(group))]
    return [
        like.clone()
        if found.kind_of(key) == "weight"
        else torch.full_like(like, found.initial_value(key, group))
        for key in keys
    ]


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """A sample of the elements of all tensors as one float64 vector, at fixed positions.

    The sample contains all elements if there are at most about SAMPLED. Otherwise it contains every
    k-th element, with odd k so that all SIMD lanes occur, and the last 64 elements of each tensor,
    which the remainder of a vectorized loop computes.
    """
    k = max(1, sum(t.numel() for t in tensors) // SAMPLED) | 1
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        parts.append(flat[::k])
        if k > 1:
            parts.append(flat[-64:])
    return torch.cat(parts).double()


def _largest(tensors: Sequence[Tensor], block: int) -> Tensor:
    """For each sampled element, the largest magnitude in the block of the element."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).abs()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
        parts.append(blocks.amax(1).repeat_interleave(block)[: len(flat)])
    return sample(parts)


def _neighbours(unit: Tensor) -> tuple[Tensor, Tensor]:
    """The values of dynamic8's signed map just below and just above magnitudes in [0, 1].

    In decade k of seven, 10^(k - 7) to 10^(k - 6), the map has the centres of 2^k equal parts.
    """
    values = [0.0, 1.0]
    for k in range(7):
        values += [(0.1 + 0.9 * (j + 0.5) / 2**k) * 10.0 ** (k - 6) for j in range(2**k)]
    ladder = torch.tensor(sorted(values), dtype=torch.float64, device=unit.device)
    above = torch.searchsorted(ladder, unit).clamp(1, len(ladder) - 1)
    return ladder[above - 1], ladder[above]


class Expected:
    """The expected values of the sampled weights after two steps, in float64.

    Attributes:
        after: the weights with exact states.
        low, high: bounds on the weights without rounding. They equal ``after`` except for the
            elements in ``lost``.
        lost: a mask of the elements that are too small in their block for the codes of the format;
            None if the states have no blocks.
    """

    def __init__(self, case: Case, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.case = case
        self.before, grad = sample(weights), sample(grads)
        states = initial_states(case.rule, self.before)
        self.after, self.path = self.before, torch.zeros_like(self.before)
        self.lost: Tensor | None = None
        for t in range(1, STEPS + 1):
            if t == STEPS and case.rule == "adamw" and case.states in BLOCKS:
                bounds = self._bounds if case.states == "dynamic8" else self._bounds_mx8
                lost, low, high = bounds(states, grad, _largest(grads, BLOCKS[case.states]))
                self.lost = lost
            now, states = exact_step(case.rule, self.after, grad, t, states)
            self.path = self.path + (now - self.after).abs()
            self.after, grad = now, SECOND * grad
        self.low = self.high = self.after
        if self.lost is not None:
            self.low = torch.where(lost, torch.minimum(low, self.after), self.after)
            self.high = torch.where(lost, torch.maximum(high, self.after), self.after)

    def _bounds(
        self, states: list[Tensor], grad: Tensor, largest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds on the weights after the second step of AdamW with dynamic8 states.

        A second moment below half of the lowest value of its block becomes zero if it is rounded to
        nearest, or the lowest code in implementations that prevent zeros. The second step can
        therefore have any size from zero up to the step whose denominator comes only from the
        element's own second gradient. The first moment is also small in its block, and can be
        rounded to either of the two adjacent values.

        Args:
            states: the moments after the first step.
            grad: the gradient of the second step.
            largest: the largest magnitude of the first gradient in the block of each element.

        Returns:
            (mask of second moments that dynamic8 cannot represent, lowest weight, highest weight).
        """
        beta1, beta2 = OPTIONS["adamw"]["betas"]
        lost = states[1] < LOWEST / 2 * (1 - beta2) * largest**2
        scale = (1 - beta1) * largest
        around = _neighbours((states[0] / scale).abs().clamp(max=1))
        small, great = (states[0].sign() * scale * value for value in around)
        ends = []
        for first, second in (
            (states[0], torch.full_like(grad, torch.inf)),
            (small, torch.zeros_like(grad)),
            (great, torch.zeros_like(grad)),
        ):
            ends.append(exact_step("adamw", self.after, grad, STEPS, [first, second])[0])
        found = torch.stack(ends)
        return lost, found.amin(0), found.amax(0)

    def _bounds_mx8(
        self, states: list[Tensor], grad: Tensor, largest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds on the weights after the second step of AdamW with mx8 states.

        The bounds combine the lowest and highest value to which each moment can be rounded. The
        arguments are those of :meth:`_bounds`.

        Returns:
            (mask of first moments that are small in their block, lowest weight, highest weight).
        """
        beta1, beta2 = OPTIONS["adamw"]["betas"]
        first, second = states
        scale = (1 - beta1) * largest
        lost = first.abs() < SMALL * scale
        reach = (first.abs() + EVEN * scale) / 8
        lowest = FLOOR * (1 - beta2) * largest**2
        ends = [
            exact_step("adamw", self.after, grad, STEPS, [m, v])[0]
            for m in (first - reach, first + reach)
            for v in (second * 7 / 8, torch.maximum(second * 9 / 8, lowest))
        ]
        found = torch.stack(ends)
        return lost, found.amin(0), found.amax(0)

    def problem(
        self,
        step: Callable[[], Any],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        slack: float,
        other_codes: bool = False,
    ) -> str:
        """Takes two steps and compares the weights with the expected values.

        The allowed error per step is 2 eps of the weights' dtype, relative to the magnitude of the
        weight plus the distance that it has moved. Half an eps is the rounding of the weight; the
        rest is the rounding of the moments and of the update.

        Args:
            step: a function that takes a step on the weights with the gradients ``grads``.
            weights: the weights, with the values given to the constructor; changed.
            grads: the gradients given to the constructor; scaled for step 2, then restored.
            slack: an additional allowed error, as a fraction of the update.
            other_codes: whether the states use other codes than the case.

        Returns:
            A description of the error; empty if the weights are correct.
        """
        step()
        torch._foreach_mul_(list(grads), SECOND)
        step()
        torch._foreach_mul_(list(grads), 1 / SECOND)
        found = sample(weights)
        eps = torch.finfo(DTYPES[self.case.dtype]).eps
        unit = eps * (self.before.abs() + self.path)
        # Stochastic rounding can move a weight by a whole spacing instead of half.
        rounding = 4.0 if self.case.weights == "stochastic" else 2.0
        coarse = torch.full_like(unit, COARSE.get(self.case.states, 0.0))
        if self.lost is not None and self.case.states == "dynamic8":
            coarse[self.lost] = 0.0  # low and high already include this error
        limit = rounding * STEPS * unit + (slack + coarse) * self.path
        off = torch.maximum(self.low - found, found - self.high)
        wrong = ~(off <= limit)  # also true for NaN
        if int(wrong.sum()) <= (OTHER_CODES * len(found) if other_codes else 0):
            return ""
        i = int(torch.argmax((off / limit).nan_to_num(float("inf"))))
        return (
            f"{int(wrong.sum())} of {len(found)} compared weights are wrong after {STEPS} steps: "
            f"one that was {self.before[i]:.9g} is {found[i]:.9g}, should be {self.after[i]:.9g} "
            f"within {limit[i]:.1e}{self.note()}"
        )

    def note(self) -> str:
        """The number of elements for which the check is relaxed, and the reason; empty if none."""
        if self.lost is None:
            return ""
        count = int(self.lost.sum())
        if self.case.states == "mx8":
            return (
                f"; {count} are small in their block, where codes lie evenly, and may be a code off"
            )
        return (
            f"; {count} have a second moment that the map of dynamic8 has no "
            "value for, and may step by anything up to what their own gradient allows"
        )
