"""The rules in NumPy.

A rule takes and returns fp32 arrays and knows nothing of memory:
``(param, grad, states, h, flags) -> (param, states)``. ``states`` has the rule's slots in the
order of :data:`onepass.rules.RULES`, None where the flags leave one out; ``h`` holds the fp32
scalars that the rule's ``derive`` made from the options and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from .arrays import F32, States

Update = Callable[[F32, F32, States, Sequence[np.float32], Collection[str]], tuple[F32, States]]


def _some(state: F32 | None) -> F32:
    assert state is not None
    return state


def sgd(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """SGD, momentum, Nesterov: torch.optim.SGD's form (Sutskever et al. 2013)."""
    lr, weight_decay, momentum, one_minus_dampening = h
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    direction = grad
    momentum_buffer = states[0]
    if "momentum" in flags:
        momentum_buffer = momentum * _some(momentum_buffer) + one_minus_dampening * grad
        direction = grad + momentum * momentum_buffer if "nesterov" in flags else momentum_buffer
    delta = lr * direction
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (momentum_buffer,)


def adagrad(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Adagrad (Duchi, Hazan, Singer 2011)."""
    lr, weight_decay, eps = h
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    sum_ = _some(states[0]) + grad * grad
    denom = np.sqrt(sum_ + eps) if "eps_in_sqrt" in flags else np.sqrt(sum_) + eps
    delta = lr * (grad / denom)
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (sum_,)


def rmsprop(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """RMSprop (Hinton 2012), centered (Graves 2013).

    The centered variance is held at zero or above: rounding can take it below, where torch.optim's
    root gives NaN.
    """
    lr, weight_decay, alpha, one_minus_alpha, eps, momentum = h
    square_avg, momentum_buffer, grad_avg = _some(states[0]), states[1], states[2]
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    square_avg = alpha * square_avg + one_minus_alpha * (grad * grad)
    variance = square_avg
    if "centered" in flags:
        grad_avg = alpha * _some(grad_avg) + one_minus_alpha * grad
        variance = square_avg - grad_avg * grad_avg
        variance = np.where(variance < 0, np.float32(0), variance)
    denom = np.sqrt(variance + eps) if "eps_in_sqrt" in flags else np.sqrt(variance) + eps
    direction = grad / denom
    if "momentum" in flags:
        momentum_buffer = momentum * _some(momentum_buffer) + direction
        direction = momentum_buffer
    delta = lr * direction
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (square_avg, momentum_buffer, grad_avg)


def adam(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Adam (Kingma, Ba 2015), AdamW (Loshchilov, Hutter 2019), amsgrad (Reddi et al. 2018).

    The bias corrections are in h: step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t) and eps times
    sqrt(1 - beta2^t), so that one root and one division are left.
    """
    step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_sq, max_exp_avg_sq = _some(states[0]), _some(states[1]), states[2]
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    second = exp_avg_sq
    if "amsgrad" in flags:
        highest = _some(max_exp_avg_sq)
        max_exp_avg_sq = np.where(highest >= exp_avg_sq, highest, exp_avg_sq)
        second = max_exp_avg_sq
    denom = np.sqrt(second) + eps
    delta = step_size * (exp_avg / denom)
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq, max_exp_avg_sq)


def lion(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """Lion (Chen et al. 2023). sign(0) is 0; sign(NaN) is NaN, so that it shows in the weight."""
    lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = h
    exp_avg = _some(states[0])
    if "decoupled" not in flags:
        grad = grad + weight_decay * param
    blend = beta1 * exp_avg + one_minus_beta1 * grad
    sign = np.where(blend > 0, np.float32(1), np.where(blend < 0, np.float32(-1), blend))
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    delta = lr * sign
    if "decoupled" in flags:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg,)
