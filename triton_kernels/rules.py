"""The rules in Triton, with the names of :mod:`onepass.rules`.

``<name>(param, grad, states, h, FLAGS) -> (param, states)`` is the update on fp32 blocks, with the
line order of the specification. ``states`` has one block per slot of the rule; the block of a slot
that the flags omit is a placeholder that no line reads. ``h`` holds the fp32 scalars of ``derive``,
and bit i of ``FLAGS`` is the i-th flag of the rule. Square roots and divisions are correctly
rounded, and the launch turns fma contraction off, so the results equal those of the specification
bit for bit.

``derive_<name>(o, step, first, scalar_states) -> scalars`` is ``derive`` of the rule, on float64
scalars. o is a row of the options table, step is the int64 step number, and first is true if no
step has been taken with these states.

``advance_<name>(o, step, scalar_states) -> scalar_states`` is ``advance`` of the rule, if it has
one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onepass import rules as rule_table

from .roots import over_root

# Columns of the options table.
DECOUPLED = tl.constexpr(rule_table.DECOUPLED)
LR = tl.constexpr(rule_table.LR)
WEIGHT_DECAY = tl.constexpr(rule_table.WEIGHT_DECAY)
OWN = tl.constexpr(rule_table.OWN)
LOG_2 = tl.constexpr(rule_table.base.LOG_2)
MAX_OPTIONS = tl.constexpr(rule_table.limits.MAX_OPTIONS)


@triton.jit
def power(base, exponent):
    """base to an integer exponent, by repeated squaring, with the same bits as the reference."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@triton.jit
def exponential(x):
    """e ** x for a finite x <= 0, with the same bits as the reference."""
    halvings = 0
    while x < -0.0625:
        x = x * 0.5
        halvings += 1
    result = tl.full((), 1.0, tl.float64)
    for i in tl.static_range(10):
        result = 1.0 + result * x / (10 - i)
    while halvings > 0:
        result = result * result
        halvings -= 1
    return result


@triton.jit
def logarithm(x):
    """The natural logarithm of x in (0, 1], with the same bits as the reference."""
    one = tl.full((), 1.0, tl.float64)
    doublings = 0
    while (x < 0.5) & (doublings < 1100):
        x = x * 2.0
        doublings += 1
    part = (x - one) / (x + one)
    square = part * part
    series = tl.full((), 0.0, tl.float64)
    for i in tl.static_range(21):
        series = series * square + one / (41 - 2 * i)
    return 2.0 * part * series - tl.full((), LOG_2, tl.float64) * doublings.to(tl.float64)


@triton.jit
def cautious(delta, decayed, param):
    """delta + decayed where delta * param >= 0, else delta."""
    opposed = ((delta < 0) & (param > 0)) | ((delta > 0) & (param < 0))
    return tl.where(opposed, delta, delta + decayed)


@triton.jit
def decay(o, lr):
    """The weight decay of an update; decoupled weight decay is multiplied by lr."""
    return tl.where(o[DECOUPLED] != 0, lr * o[WEIGHT_DECAY], o[WEIGHT_DECAY])


@triton.jit
def sgd(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    MOMENTUM: tl.constexpr = FLAGS & 2
    NESTEROV: tl.constexpr = FLAGS & 4
    CAUTIOUS: tl.constexpr = FLAGS & 8
    lr, weight_decay, momentum, one_minus_dampening = h
    if not DECOUPLED:
        grad = grad + weight_decay * param
    direction = grad
    momentum_buffer = states[0]
    if MOMENTUM:
        momentum_buffer = momentum * momentum_buffer + one_minus_dampening * grad
        direction = grad + momentum * momentum_buffer if NESTEROV else momentum_buffer
    delta = lr * direction
    if CAUTIOUS:
        delta = cautious(delta, weight_decay * param, param)
    elif DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (momentum_buffer,)


@triton.jit
def derive_sgd(o, step, first, scalar_states):
    momentum, dampening = o[OWN], o[OWN + 1]
    kept = tl.where(first, 1.0, 1.0 - dampening)
    return o[LR], decay(o, o[LR]), momentum, kept


@triton.jit
def adagrad(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    EPS_IN_SQRT: tl.constexpr = FLAGS & 2
    lr, weight_decay, eps = h
    if not DECOUPLED:
        grad = grad + weight_decay * param
    sum_ = states[0] + grad * grad
    delta = lr * over_root(grad, sum_, eps, FLAGS, EPS_IN_SQRT)
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (sum_,)


@triton.jit
def derive_adagrad(o, step, first, scalar_states):
    eps, lr_decay = o[OWN], o[OWN + 1]
    lr = o[LR] / (1.0 + (step - 1).to(tl.float64) * lr_decay)
    return lr, decay(o, lr), eps


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
    direction = over_root(grad, variance, eps, FLAGS, EPS_IN_SQRT)
    if MOMENTUM:
        momentum_buffer = momentum * momentum_buffer + direction
        direction = momentum_buffer
    delta = lr * direction
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (square_avg, momentum_buffer, grad_avg)


@triton.jit
def derive_rmsprop(o, step, first, scalar_states):
    alpha, eps, momentum = o[OWN], o[OWN + 1], o[OWN + 2]
    return o[LR], decay(o, o[LR]), alpha, 1.0 - alpha, eps, momentum


@triton.jit
def adam(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    AMSGRAD: tl.constexpr = FLAGS & 2
    CAUTIOUS: tl.constexpr = FLAGS & 4
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
    delta = step_size * over_root(exp_avg, second, eps, FLAGS)
    if CAUTIOUS:
        delta = cautious(delta, weight_decay * param, param)
    elif DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def derive_adam(o, step, first, scalar_states):
    beta1, beta2, eps = o[OWN], o[OWN + 1], o[OWN + 2]
    root = tl.sqrt(1.0 - power(beta2, step))
    step_size = o[LR] * root / (1.0 - power(beta1, step))
    return step_size, decay(o, o[LR]), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


@triton.jit
def ademamix(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    fast_size, slow_size, weight_decay = h[0], h[1], h[2]
    beta1, one_minus_beta1, beta2, one_minus_beta2 = h[3], h[4], h[5], h[6]
    beta3, one_minus_beta3, eps = h[7], h[8], h[9]
    exp_avg, exp_avg_slow, exp_avg_sq = states
    if not DECOUPLED:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_slow = beta3 * exp_avg_slow + one_minus_beta3 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    delta = over_root(fast_size * exp_avg + slow_size * exp_avg_slow, exp_avg_sq, eps, FLAGS)
    if DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_slow, exp_avg_sq)


@triton.jit
def derive_ademamix(o, step, first, scalar_states):
    beta1, beta2, beta3, eps = o[OWN], o[OWN + 1], o[OWN + 2], o[OWN + 3]
    alpha, t_alpha, t_beta3 = o[OWN + 4], o[OWN + 5], o[OWN + 6]
    log_beta1, log_beta3 = o[OWN + 7], o[OWN + 8]
    number = step.to(tl.float64)
    if number < t_alpha:
        alpha = alpha * (number / t_alpha)
    if number < t_beta3:
        part = number / t_beta3
        mixed = (1.0 - part) * log_beta3 + part * log_beta1
        beta3 = exponential(log_beta1 * log_beta3 / mixed)
    root = tl.sqrt(1.0 - power(beta2, step))
    fast_size = o[LR] * root / (1.0 - power(beta1, step))
    slow_size = o[LR] * root * alpha
    weight_decay = decay(o, o[LR])
    averages = (beta1, 1.0 - beta1, beta2, 1.0 - beta2, beta3, 1.0 - beta3)
    return (fast_size, slow_size, weight_decay) + averages + (eps * root,)


@triton.jit
def lion(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    CAUTIOUS: tl.constexpr = FLAGS & 2
    lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = h
    exp_avg = states[0]
    if not DECOUPLED:
        grad = grad + weight_decay * param
    blend = beta1 * exp_avg + one_minus_beta1 * grad
    sign = tl.where(blend > 0, 1.0, tl.where(blend < 0, -1.0, blend))
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    delta = lr * sign
    if CAUTIOUS:
        delta = cautious(delta, weight_decay * param, param)
    elif DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg,)


@triton.jit
def derive_lion(o, step, first, scalar_states):
    beta1, beta2 = o[OWN], o[OWN + 1]
    return o[LR], decay(o, o[LR]), beta1, 1.0 - beta1, beta2, 1.0 - beta2


@triton.jit
def muon(param, grad, states, h, FLAGS: tl.constexpr):
    NESTEROV: tl.constexpr = FLAGS & 1
    momentum, one_minus_momentum = h[2], h[3]
    momentum_buffer = momentum * states[0] + one_minus_momentum * grad
    direction = momentum_buffer
    if NESTEROV:
        direction = momentum * momentum_buffer + one_minus_momentum * grad
    return direction, (momentum_buffer,)


@triton.jit
def derive_muon(o, step, first, scalar_states):
    momentum = o[OWN]
    return o[LR], o[LR] * o[WEIGHT_DECAY], momentum, 1.0 - momentum


@triton.jit
def nadam(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    CAUTIOUS: tl.constexpr = FLAGS & 2
    grad_size, avg_size, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = h
    exp_avg, exp_avg_sq = states
    if not DECOUPLED:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    delta = over_root(grad_size * grad + avg_size * exp_avg, exp_avg_sq, eps, FLAGS)
    if CAUTIOUS:
        delta = cautious(delta, weight_decay * param, param)
    elif DECOUPLED:
        delta = delta + weight_decay * param
    return param - delta, (exp_avg, exp_avg_sq)


@triton.jit
def momentum_of_nadam(o, step):
    """mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)"""
    return o[OWN] * (1.0 - 0.5 * power(o[OWN + 3], step))


@triton.jit
def advance_nadam(o, step, scalar_states):
    return (scalar_states[0] * momentum_of_nadam(o, step),)


@triton.jit
def derive_nadam(o, step, first, scalar_states):
    beta1, beta2, eps = o[OWN], o[OWN + 1], o[OWN + 2]
    mu, mu_next = momentum_of_nadam(o, step), momentum_of_nadam(o, step + 1)
    mu_product = scalar_states[0]
    root = tl.sqrt(1.0 - power(beta2, step))
    scale = o[LR] * root
    grad_size = scale * (1.0 - mu) / (1.0 - mu_product)
    avg_size = scale * mu_next / (1.0 - mu_product * mu_next)
    weight_decay = decay(o, o[LR])
    return grad_size, avg_size, weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root


@triton.jit
def schedulefree(param, grad, states, h, FLAGS: tl.constexpr):
    DECOUPLED: tl.constexpr = FLAGS & 1
    step_size, weight_decay, beta2, one_minus_beta2, eps, share, scale = h
    z, exp_avg_sq = states
    if not DECOUPLED:
        grad = grad + weight_decay * param
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    delta = step_size * over_root(grad, exp_avg_sq, eps, FLAGS)
    if DECOUPLED:
        delta = delta + weight_decay * param
    param = param - (scale * delta - share * (z - param))
    return param, (z - delta, exp_avg_sq)


@triton.jit
def warmed_up(o, step):
    """The learning rate of a step of schedulefree."""
    number, warmup_steps = step.to(tl.float64), o[OWN + 3]
    lr = o[LR]
    if number < warmup_steps:
        lr = lr * (number / warmup_steps)
    return lr


@triton.jit
def advance_schedulefree(o, step, scalar_states):
    r, lr_power = o[OWN + 4], o[OWN + 5]
    weight_sum, lr_max = scalar_states[0], scalar_states[1]
    largest = warmed_up(o, step).to(tl.float32).to(tl.float64)
    if lr_max > largest:
        largest = lr_max
    total = tl.full((), 1.0, tl.float64)
    if (largest <= 0) & (lr_power > 0):
        total = tl.full((), 0.0, tl.float64)
        largest = tl.full((), 0.0, tl.float64)
    elif weight_sum > 0:
        exponent = tl.full((), 0.0, tl.float64)
        if (r > 0) & (step > 1):
            exponent = r * logarithm((step - 1).to(tl.float64) / step.to(tl.float64))
        if (lr_power > 0) & (lr_max > 0) & (lr_max < largest):
            exponent = exponent + lr_power * logarithm(lr_max / largest)
        total = weight_sum * exponential(exponent) + 1.0
    return total, largest


@triton.jit
def derive_schedulefree(o, step, first, scalar_states):
    beta1, beta2, eps = o[OWN], o[OWN + 1], o[OWN + 2]
    weight_sum = scalar_states[0]
    lr = warmed_up(o, step)
    root = tl.sqrt(1.0 - power(beta2, step))
    share = tl.full((), 0.0, tl.float64)
    if weight_sum > 0:
        share = 1.0 / weight_sum
    scale = 1.0 - beta1 * (1.0 - share)
    return lr * root, decay(o, lr), beta2, 1.0 - beta2, eps * root, share, scale


@triton.jit
def derive_options(o, step, first, scalar_states):
    """The default of custom rules: lr, the weight decay, and the rule's own numbers."""
    scalars = (o[LR], decay(o, o[LR]))
    for i in tl.static_range(MAX_OPTIONS):
        scalars = scalars + (o[OWN + i],)
    return scalars


@triton.jit
def keep(o, step, scalar_states):
    """The advance of a rule without scalar states."""
    return scalar_states


def update_of(rule):
    """The update function of a rule."""
    return globals()[rule.name] if rule.options is None else rule.triton_update


def derive_of(rule):
    """The function derive of a rule."""
    if rule.options is None:
        return globals()[f"derive_{rule.name}"]
    return rule.triton_derive or derive_options


def advance_of(rule):
    """The function advance of a rule."""
    if rule.options is None:
        return globals().get(f"advance_{rule.name}", keep)
    return rule.triton_advance or keep
