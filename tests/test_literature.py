"""Where momentum and Nesterov momentum of onepass equal the textbook formulas, and where not.

Textbook momentum: v = gamma v + lr g(theta); theta = theta - v.
Textbook Nesterov: v = gamma v + lr g(theta - gamma v); theta = theta - v.
onepass and torch.optim: buf = gamma buf + g(theta); theta = theta - lr buf.
Their Nesterov momentum: the same buf; theta = theta - lr (g + gamma buf).
"""

from __future__ import annotations

import pytest
import torch

import onepass

HESSIAN = torch.tensor([[3.0, 0.5], [0.5, 0.2]])
START = torch.tensor([1.0, -2.0])
GAMMA = 0.9


def gradient(theta):
    return HESSIAN @ theta + 0.1 * theta**3


def ours(lrs, nesterov=False):
    param = torch.nn.Parameter(START.clone())
    optimizer = onepass.SGD([param], lr=lrs[0], momentum=GAMMA, nesterov=nesterov)
    path = []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        param.grad = gradient(param.detach())
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path), optimizer.state[param]["momentum_buffer"]


def textbook_momentum(lrs):
    theta, v, path = START.clone(), torch.zeros(2), []
    for lr in lrs:
        v = GAMMA * v + lr * gradient(theta)
        theta = theta - v
        path.append(theta.clone())
    return torch.stack(path), v


def textbook_nesterov(lrs):
    """The points theta, and the points theta - gamma v at which the gradient is taken."""
    theta, v, path, ahead = START.clone(), torch.zeros(2), [], []
    for lr in lrs:
        v = GAMMA * v + lr * gradient(theta - GAMMA * v)
        theta = theta - v
        path.append(theta.clone())
        ahead.append(theta - GAMMA * v)
    return torch.stack(path), torch.stack(ahead)


CONSTANT = [0.05] * 60
HALVED = [0.05] * 10 + [0.005] * 50


def test_momentum_is_the_textbooks_while_lr_is_constant():
    path, buffer = ours(CONSTANT)
    expected, v = textbook_momentum(CONSTANT)
    torch.testing.assert_close(path, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(0.05 * buffer, v, rtol=1e-3, atol=1e-6)


def test_momentum_differs_once_lr_changes():
    """The textbook's v contains the old lr; onepass multiplies the buffer by the new lr."""
    path, _ = ours(HALVED)
    expected, _ = textbook_momentum(HALVED)
    torch.testing.assert_close(path[:10], expected[:10], rtol=1e-4, atol=1e-5)
    assert (path[12] - expected[12]).abs().max() > 0.05


def test_nesterov_holds_the_point_ahead_while_lr_is_constant():
    """The weight is the textbook's theta - gamma v, so the sequence is that of theta - gamma v."""
    path, _ = ours(CONSTANT, nesterov=True)
    theta, ahead = textbook_nesterov(CONSTANT)
    torch.testing.assert_close(path, ahead, rtol=1e-4, atol=1e-5)
    assert (path - theta).abs().max() > 0.05
    # Both converge to the same point, because v goes to zero with the gradient.
    assert (path[-1] - theta[-1]).norm() < 0.2 * theta[0].norm()


def test_nesterov_differs_once_lr_changes():
    path, _ = ours(HALVED, nesterov=True)
    _, ahead = textbook_nesterov(HALVED)
    torch.testing.assert_close(path[:10], ahead[:10], rtol=1e-4, atol=1e-5)
    assert (path[12] - ahead[12]).abs().max() > 0.02


def test_dampening_is_not_in_the_textbooks():
    param = torch.nn.Parameter(START.clone())
    optimizer = onepass.SGD([param], lr=0.05, momentum=GAMMA, dampening=0.5)
    for _ in range(5):
        param.grad = gradient(param.detach())
        optimizer.step()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(param.detach(), textbook_momentum(CONSTANT)[0][4])
