"""Whether a provider's step is right: two steps against the rules written out in float64.

Independent of onepass.reference, and in the form of the papers: nothing is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import DTYPES, OPTIONS, Case

Tensor = torch.Tensor
Update = Callable[[Tensor, Tensor, int, list[Tensor], dict[str, Any]], Tensor]

SAMPLED = 1 << 20
"""About how many elements of a list are compared; all of them if it has no more."""
STEPS = 2
COARSE = {"mx8": 0.25, "dynamic8": 0.25, "mx4": 2.0}
"""What coarse states may change of the way of a weight, as a fraction: a code of mx8 is an eighth
of its value from the next, a code of mx4 a half, and both moments of an element are rounded."""
SECOND = -0.5
"""The second gradient over the first, exact to form. With equal gradients Adam's update would not
depend on its betas."""


def _adamw(w: Tensor, g: Tensor, t: int, s: list[Tensor], o: dict[str, Any]) -> Tensor:
    beta1, beta2 = o["betas"]
    s[0] = beta1 * s[0] + (1 - beta1) * g
    s[1] = beta2 * s[1] + (1 - beta2) * g * g
    m, v = s[0] / (1 - beta1**t), s[1] / (1 - beta2**t)
    return w - o["lr"] * (m / (v.sqrt() + o["eps"]) + o["weight_decay"] * w)


def _lion(w: Tensor, g: Tensor, t: int, s: list[Tensor], o: dict[str, Any]) -> Tensor:
    beta1, beta2 = o["betas"]
    update = torch.sign(beta1 * s[0] + (1 - beta1) * g)
    s[0] = beta2 * s[0] + (1 - beta2) * g
    return w - o["lr"] * (update + o["weight_decay"] * w)


def _sgd(w: Tensor, g: Tensor, t: int, s: list[Tensor], o: dict[str, Any]) -> Tensor:
    s[0] = o["momentum"] * s[0] + g
    return w - o["lr"] * s[0]


def _adagrad(w: Tensor, g: Tensor, t: int, s: list[Tensor], o: dict[str, Any]) -> Tensor:
    s[0] = s[0] + g * g
    return w - o["lr"] * g / (s[0].sqrt() + o["eps"])


def _rmsprop(w: Tensor, g: Tensor, t: int, s: list[Tensor], o: dict[str, Any]) -> Tensor:
    s[0] = o["alpha"] * s[0] + (1 - o["alpha"]) * g * g
    return w - o["lr"] * g / (s[0].sqrt() + o["eps"])


RULES: dict[str, Update] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
}


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """Elements of all tensors as one float64 vector: the same positions at every call.

    Every element when there are few; else each k-th one, k odd so that all lanes of a vector come
    up, and the last 64 of each tensor, which are the remainder of a vector loop.
    """
    k = max(1, sum(t.numel() for t in tensors) // SAMPLED) | 1
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        parts.append(flat[::k])
        if k > 1:
            parts.append(flat[-64:])
    return torch.cat(parts).double()


class Expected:
    """What the sampled weights are after two steps, in float64."""

    def __init__(self, case: Case, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.case = case
        self.before, grad = sample(weights), sample(grads)
        zero = torch.zeros_like(self.before)
        states = [zero, zero]
        self.after, self.path = self.before, zero
        for t in range(1, STEPS + 1):
            now = RULES[case.rule](self.after, grad, t, states, OPTIONS[case.rule])
            self.path = self.path + (now - self.after).abs()
            self.after, grad = now, SECOND * grad

    def problem(
        self,
        step: Callable[[], Any],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        slack: float,
    ) -> str:
        """Takes the two steps and says what is wrong with them; empty when nothing is.

        The limit is 2 eps of the weights' dtype per step, at the size of the weight and of its way:
        half an eps is the rounding of the weight, the rest that of the moments and of the update.

        Args:
            step: takes a step on the weights, whose gradients are grads.
            weights: as they were given to the constructor; changed.
            grads: likewise; scaled for the second step and scaled back.
            slack: allowed on top, as a fraction of the update.
        """
        step()
        torch._foreach_mul_(list(grads), SECOND)
        step()
        torch._foreach_mul_(list(grads), 1 / SECOND)
        found = sample(weights)
        eps = torch.finfo(DTYPES[self.case.dtype]).eps
        unit = eps * (self.before.abs() + self.path)
        # A weight that is rounded stochastically may be a whole spacing off.
        rounding = 4.0 if self.case.weights == "stochastic" else 2.0
        slack += COARSE.get(self.case.states, 0.0)
        limit = rounding * STEPS * unit + slack * self.path
        wrong = ~((found - self.after).abs() <= limit)  # catches NaN too
        if not wrong.any():
            return ""
        i = int(torch.argmax(((found - self.after).abs() / limit).nan_to_num(float("inf"))))
        return (
            f"{int(wrong.sum())} of {len(found)} compared weights are wrong after {STEPS} steps: "
            f"one that was {self.before[i]:.9g} is {found[i]:.9g}, should be {self.after[i]:.9g} "
            f"within {limit[i]:.1e}"
        )
