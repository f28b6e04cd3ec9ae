"""The specification of every format and rule, in NumPy.

The other backends return the same bits as this file: all arithmetic in fp32, round to nearest
even, denormals kept, in the order written here, with a correctly rounded root and division (NumPy's
are) and no fused multiply-add. Two NaNs count as the same bits.

A rule takes and returns fp32 arrays and knows nothing of memory:
``(param, grad, states, h, flags) -> (param, states)``. ``states`` has the rule's slots in the
order of :data:`onepass.rules.RULES`, None where the flags leave one out; ``h`` holds the fp32
scalars that the rule's ``derive`` made from the options and the step. How to add a rule or a
format: CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
States = tuple[F32 | None, ...]
Update = Callable[[F32, F32, States, Sequence[np.float32], Collection[str]], tuple[F32, States]]

# --- random bits -----------------------------------------------------------------------------

_MASK64 = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014) for the 64-bit state z."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def random_bits(seed: int, step: int, param_id: int, first: int, count: int, word: int = 0) -> U32:
    """32 random bits for each of the elements [first, first + count) of one parameter at one step.

    They depend on (seed, step, param_id, element index, word) alone, so neither on the launch
    shape nor on the sharding. A stream key comes from SplitMix64 of the first three; it is mixed
    with the index's upper half and the word into two 32-bit keys (k0, k1); the element then takes

        x = low * 0x9E3779B9 + k0
        x ^= x >> 16;  x *= 0x7FEB352D
        x ^= (x >> 15) ^ k1;  x *= 0x846CA68B

    with low the index's lower half: a Weyl sequence through the two multiplications of Wellons'
    32-bit hash "lowbias32", a second key between them. Word 0 serves the states of slots 0 (lower
    16 bits) and 1 (upper 16 bits), word 1 those of slot 2.
    """
    stream = splitmix64(splitmix64(splitmix64(seed & _MASK64) ^ step) ^ param_id)
    index = np.arange(first, first + count, dtype=np.uint64)
    out = np.empty(count, np.uint32)
    for high in range(first >> 32, (max(first, first + count - 1) >> 32) + 1):
        key = splitmix64(stream ^ (word << 32 | high))
        k0, k1 = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
        here = (index >> np.uint64(32)) == high
        x = index[here].astype(np.uint32) * np.uint32(0x9E3779B9) + k0
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= (x >> np.uint32(15)) ^ k1
        x *= np.uint32(0x846CA68B)
        out[here] = x
    return out


# --- formats ---------------------------------------------------------------------------------

_BF16_NAN = np.uint16(0x7FC0)


def decode_bf16(codes: U16) -> F32:
    """bfloat16 codes to fp32: exact."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_bf16(values: F32) -> U16:
    """fp32 to bfloat16, to nearest, ties to even. NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), _BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def encode_bf16_stochastic(values: F32, random: U32) -> U16:
    """fp32 to bfloat16, away from zero with the probability of the 16 bits dropped.

    random holds 16 bits an element. The mean of many draws is the value itself, at zero and at
    denormals too; a value that bfloat16 holds stays; NaN becomes 0x7FC0.
    """
    rounded = values.view(np.uint32) + random
    return np.where(np.isnan(values), _BF16_NAN, (rounded >> np.uint32(16)).astype(np.uint16))


def decode_fp16(codes: U16) -> F32:
    """IEEE binary16 codes to fp32: exact."""
    return codes.view(np.float16).astype(np.float32)


def encode_fp16(values: F32) -> U16:
    """fp32 to IEEE binary16, to nearest, ties to even; from 65520 on infinity."""
    return values.astype(np.float16).view(np.uint16)


# --- norm ------------------------------------------------------------------------------------


def norm(grads: Iterable[F32]) -> npt.NDArray[np.float64]:
    """Of all elements, float64 [3]: sum of squares, largest magnitude, count of non-finite ones.

    Squares are exact in float64, none overflows. The largest magnitude passes over NaN. Sums are
    the one thing in which backends may differ in their last bits.
    """
    found = np.zeros(3)
    for grad in grads:
        magnitudes = np.abs(grad.astype(np.float64))
        largest = np.fmax.reduce(magnitudes, initial=0.0)
        nonfinite = np.count_nonzero(~np.isfinite(magnitudes))
        found[0] += np.sum(magnitudes * magnitudes)
        found[1:] = max(found[1], largest), found[2] + nonfinite
    return found


# --- rules -----------------------------------------------------------------------------------


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
