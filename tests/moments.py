"""Running averages stored in a state format between steps, for tests of formats without weights.

The encoder and decoder are those of :mod:`onepass.formats`; other tests check that every backend
returns the same bits. Random bits are generated as in a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onepass.formats import STATE_FORMATS, decode_states, encode_states
from onepass.numerics.random_bits import random_bits as draw_bits

F32 = np.float32
ADAM = ("relative", "second")  # kinds of Adam's states without amsgrad
ALL_RANDOM = np.arange(1 << 16, dtype=np.uint32)  # every value of 16 random bits


def random_bits(step: int, count: int, slots: int = 2, seed: int = 0) -> list[np.ndarray]:
    """16 random bits per element for each state, as in a step."""
    words = [draw_bits(seed, step, 0, 0, count, word) for word in range(-(-slots // 2))]
    halves = [half for word in words for half in (word & np.uint32(0xFFFF), word >> np.uint32(16))]
    return halves[:slots]


def encode(name: str, values: Sequence[np.ndarray], kinds: Sequence[str], random=None):
    """The tensors that a format stores for states.

    Args:
        name: the state format.
        values: fp32 values of each state.
        kinds: the kind of each state.
        random: 16 bits per element for each state, or one number for all elements.
    """
    count = len(values[0])
    if random is None or isinstance(random, int):
        random = [np.full(count, random or 0, np.uint32)] * len(values)
    return encode_states(STATE_FORMATS[name], tuple(values), kinds, random)


def decode(name: str, stored, kinds: Sequence[str], count: int) -> list[np.ndarray]:
    """The fp32 values of states that :func:`encode` returned."""
    return list(decode_states(STATE_FORMATS[name], stored, kinds, count))


def there_and_back(name: str, values: Sequence[np.ndarray], kinds: Sequence[str], random=None):
    """The fp32 values after encoding and decoding."""
    return decode(name, encode(name, values, kinds, random), kinds, len(values[0]))


class Moments:
    """The two moments of Adam: fp32 within a step, in a state format between steps.

    Attributes:
        exp_avg, exp_avg_sq: the moments of the last step, before encoding.
    """

    def __init__(self, name: str, count: int, betas: tuple[float, float], seed: int = 0) -> None:
        self.name, self.count, self.betas, self.seed = name, count, betas, seed
        self.steps = 0
        self.put(np.zeros(count, F32), np.zeros(count, F32))

    def put(self, exp_avg: np.ndarray, exp_avg_sq: np.ndarray) -> None:
        """Encodes and stores both moments."""
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        random = None
        if STATE_FORMATS[self.name].stochastic:
            random = random_bits(self.steps, self.count, seed=self.seed)
        self.stored = encode(self.name, (exp_avg, exp_avg_sq), ADAM, random)

    def get(self) -> list[np.ndarray]:
        """Decodes both moments."""
        return decode(self.name, self.stored, ADAM, self.count)

    def add(self, grad: np.ndarray) -> np.ndarray:
        """Takes one step and returns Adam's update divided by lr, with eps = 0.

        The update is 0 where every gradient so far was zero.
        """
        (beta1, beta2), (exp_avg, exp_avg_sq) = self.betas, self.get()
        self.steps += 1
        exp_avg = F32(beta1) * exp_avg + F32(1 - beta1) * grad
        exp_avg_sq = F32(beta2) * exp_avg_sq + F32(1 - beta2) * (grad * grad)
        self.put(exp_avg, exp_avg_sq)
        correction = np.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        root = np.where(exp_avg_sq == 0, F32(1), np.sqrt(exp_avg_sq))
        return F32(correction) * (exp_avg / root)
