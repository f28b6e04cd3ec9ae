"""The rules in Triton: the lines of :mod:`onepass.reference`, in its order.

``(param, grad, states, h, FLAGS) -> (param, states)`` on fp32 blocks. ``states`` has the rule's
slots in the order of :data:`onepass.rules.RULES`, a stand-in that no line reads where the flags
leave one out; ``h`` holds the fp32 scalars of its ``derive``; bit i of ``FLAGS`` is its i-th flag.

Roots and divisions are the correctly rounded ones, and the launch turns contraction off, so that
the results are the reference's bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sgd(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    MOMENTUM: tl.constexpr = FLAGS & 2
    NESTEROV: tl.constexpr = FLAGS & 4
    lr, weight_decay, momentum, one_minus_dampening = h
    if not DECOUPLED:
        grad = grad + weight_decay * param
    direction = grad
    momentum_buffer = states[0]
    if MOMENTUM:
        momentum_buffer = momentum * momentum_buffer + one_minus_dampening * grad
        direction = grad + momentum * momentum_buffer if NESTEROV else momentum_buffer
    delta = lr * direction
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (momentum_buffer,)


@triton.jit
def adagrad(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    EPS_IN_SQRT: tl.constexpr = FLAGS & 2
    lr, weight_decay, eps = h
    if not DECOUPLED:
        grad = grad + weight_decay * param
    sum_ = states[0] + grad * grad
    denom = tl.sqrt_rn(sum_ + eps) if EPS_IN_SQRT else tl.sqrt_rn(sum_) + eps
    delta = lr * tl.div_rn(grad, denom)
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (sum_,)


@triton.jit
def rmsprop(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    MOMENTUM: tl.constexpr = FLAGS & 2
    CENTERED: tl.constexpr = FLAGS & 4
    EPS_IN_SQRT: tl.constexpr = FLAGS & 8
    lr, weight_decay, alpha, one_minus_alpha, eps, momentum = h
    square_avg, momentum_buffer, grad_avg = states
    if not DECOUPLED:
        grad = grad + weight_decay * param
    square_avg = alpha * square_avg + one_minus_alpha * (grad * grad)
    variance = square_avg
    if CENTERED:
        grad_avg = alpha * grad_avg + one_minus_alpha * grad
        variance = square_avg - grad_avg * grad_avg
        variance = tl.where(variance < 0, 0.0, variance)
    denom = tl.sqrt_rn(variance + eps) if EPS_IN_SQRT else tl.sqrt_rn(variance) + eps
    direction = tl.div_rn(grad, denom)
    if MOMENTUM:
        momentum_buffer = momentum * momentum_buffer + direction
        direction = momentum_buffer
    delta = lr * direction
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (square_avg, momentum_buffer, grad_avg)


@triton.jit
def adam(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    AMSGRAD: tl.constexpr = FLAGS & 2
    step_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    if not DECOUPLED:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    second = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tl.where(max_exp_avg_sq >= exp_avg_sq, max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    denom = tl.sqrt_rn(second) + eps
    delta = step_size * tl.div_rn(exp_avg, denom)
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def lion(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = h
    exp_avg = states[0]
    if not DECOUPLED:
        grad = grad + weight_decay * param
    blend = beta1 * exp_avg + one_minus_beta1 * grad
    sign = tl.where(blend > 0, 1.0, tl.where(blend < 0, -1.0, blend))
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    delta = lr * sign
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg,)


RULES = {"sgd": sgd, "adagrad": adagrad, "rmsprop": rmsprop, "adam": adam, "lion": lion}
