"""The counter-based random number generator of stochastic rounding, in NumPy."""

from __future__ import annotations

import numpy as np

from .arrays import U32

_MASK64 = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014) for the 64-bit state z."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def random_bits(seed: int, step: int, param_id: int, first: int, count: int, word: int = 0) -> U32:
    """32 random bits for each of the elements [first, first + count) of one parameter at one step.

    The bits depend only on (seed, step, param_id, element index, word), not on the launch shape or
    the sharding. SplitMix64 of (seed, step, param_id) gives a stream key. SplitMix64 of the stream
    key, the upper half of the index and the word gives two 32-bit keys (k0, k1). The bits x of an
    element are

        x = low * 0x9E3779B9 + k0
        x ^= x >> 16;  x *= 0x7FEB352D
        x ^= (x >> 15) ^ k1;  x *= 0x846CA68B

    where low is the lower half of the index. This is a Weyl sequence, hashed by the two
    multiplications of Wellons' 32-bit hash "lowbias32" with a second key between the two. Word 0
    rounds the states of slot 0 (lower 16 bits) and slot 1 (upper 16 bits). Word 1 rounds the state
    of slot 2 and the weight. Word 2 rounds the state of slot 3.
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
