"""A rule of your own: Signum, the sign of a momentum (Bernstein et al. 2018), with 8-bit states."""

import numpy as np
import torch

import onepass
from onepass.rules import Option, Slot
from onepass.rules.option_checks import check_fraction


def signum(param, grad, states, h, flags):
    """The update in NumPy, on fp32 arrays: the specification, and the step on a CPU."""
    lr, weight_decay, beta = h
    exp_avg = beta * states[0] + (1 - beta) * grad
    return param - (lr * np.sign(exp_avg) + weight_decay * param), (exp_avg,)


# On a GPU the rule also needs this update in Triton: see docs/own-rule.md.
Signum = onepass.optimizer(
    onepass.Rule(
        "signum",
        options={"beta": Option(0.9, check_fraction)},
        slots=(Slot("exp_avg", "first"),),
        update=signum,
    )
)

torch.manual_seed(0)
inputs = torch.randn(256, 16)
targets = inputs @ torch.randn(16, 1)
model = torch.nn.Linear(16, 1)
optimizer = Signum(model.parameters(), lr=1e-2, states="mx8", max_grad_norm=1.0)
for _ in range(300):
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.4f}")
