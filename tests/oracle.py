"""Every algorithm in float64, written as in its paper or in torch.optim.

The oracle is independent of the specification in onepass.rules: bias corrections are not folded
into the step size, and weight decay is where the paper applies it. tests/test_oracle.py first
compares the oracle with torch.optim in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


class Oracle:
    """One parameter that one algorithm updates in float64."""

    def __init__(
        self,
        name: str,
        param: Tensor,
        options: dict[str, Any],
        direction: Callable[[Oracle, Tensor], Tensor] | None = None,
    ) -> None:
        """Copies the parameter to float64.

        Args:
            name: the algorithm.
            param: the initial weights.
            options: the options of its parameter group.
            direction: the update of an algorithm without a method below; see tests/cases.py.
        """
        self.name, self.o = name, options
        method = "_" + name.removesuffix("w")
        self.direction = direction or getattr(type(self), method)
        self.p = param.detach().double().clone()
        self.t = 0
        self.s: dict[str, Tensor] = {}

    def state(self, key: str, start: float = 0.0) -> Tensor:
        return self.s.setdefault(key, torch.full_like(self.p, start))

    def step(self, grad: Tensor) -> None:
        o, g = self.o, grad.double()
        self.t += 1
        if o["maximize"]:
            g = -g
        lr = o["lr"]
        if self.name == "adagrad":
            lr = lr / (1 + (self.t - 1) * o["lr_decay"])
        before = self.p.clone()
        if not o["decoupled_weight_decay"]:
            g = g + o["weight_decay"] * before
        update = self.direction(self, g)
        self.p = before - lr * update
        if o["decoupled_weight_decay"]:
            kept = update * before >= 0 if o.get("cautious_weight_decay") else True
            self.p -= lr * o["weight_decay"] * before * kept

    def _sgd(self, g: Tensor) -> Tensor:
        mu = self.o.get("momentum", 0)
        if not mu:
            return g
        if "momentum_buffer" not in self.s:
            self.s["momentum_buffer"] = g.clone()
        else:
            kept = 1 - self.o.get("dampening", 0)
            self.s["momentum_buffer"] = mu * self.s["momentum_buffer"] + kept * g
        buf = self.s["momentum_buffer"]
        return g + mu * buf if self.o.get("nesterov") else buf

    def _adagrad(self, g: Tensor) -> Tensor:
        s = self.state("sum", self.o["initial_accumulator_value"])
        s += g * g
        eps = self.o.get("eps", 1e-10)
        return g / ((s + eps).sqrt() if self.o["eps_in_sqrt"] else s.sqrt() + eps)

    def _rmsprop(self, g: Tensor) -> Tensor:
        alpha, eps = self.o.get("alpha", 0.99), self.o.get("eps", 1e-8)
        s = self.state("square_avg")
        s.mul_(alpha).add_((1 - alpha) * g * g)
        v = s
        if self.o["centered"]:
            a = self.state("grad_avg")
            a.mul_(alpha).add_((1 - alpha) * g)
            v = (s - a * a).clamp_min(0)
        d = g / ((v + eps).sqrt() if self.o["eps_in_sqrt"] else v.sqrt() + eps)
        if not self.o["momentum"]:
            return d
        buf = self.state("momentum_buffer")
        buf.mul_(self.o["momentum"]).add_(d)
        return buf

    def _adam(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.o.get("betas", (0.9, 0.999))
        eps = self.o.get("eps", 1e-8)
        m, v = self.state("exp_avg"), self.state("exp_avg_sq")
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        if self.o["amsgrad"]:
            v = torch.maximum(self.state("max_exp_avg_sq"), v)
            self.s["max_exp_avg_sq"] = v
        m_hat, v_hat = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
        return m_hat / (v_hat.sqrt() + eps)

    def _lion(self, g: Tensor) -> Tensor:
        # Program 1 of "Symbolic discovery of optimization algorithms", line by line.
        beta1, beta2 = self.o.get("betas", (0.9, 0.99))
        m = self.state("exp_avg")
        update = torch.sign(beta1 * m + (1 - beta1) * g)
        m.mul_(beta2).add_((1 - beta2) * g)
        return update
