"""The counter-based random number generator of stochastic rounding, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .arrays import U32

# The positions of the 16 random bits of each use; see bits_from.
STATE_BITS = (0, 16, 32, 64)  # of the state in each slot
WEIGHT_BITS = 48  # of a weight
SHARED_WEIGHT_BITS = 8  # of a weight if a state of the parameter draws too

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
    multiplications of Wellons' 32-bit hash "lowbias32" with a second key between the two.
    :func:`bits_from` takes the bits of one use from these words.
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


def bits_from(words: Mapping[int, U32], position: int) -> U32:
    """The 16 random bits per element of one use, in the lower half of each result.

    A position counts the bits of an element from the lowest bit of word 0, which is bit 0, over
    word 1, whose lowest is bit 32, and so on. A use has the 16 bits from its position up. The
    states have the positions STATE_BITS, so that no two of them share a bit. A weight has
    WEIGHT_BITS if no state of the parameter draws, so that it shares no bit either. Otherwise it
    has SHARED_WEIGHT_BITS, so that two states and the weight need one word. Its upper 8 bits are
    then the lower 8 of slot 1, and its lower 8 bits the upper 8 of slot 0.

    Every use is uniform, so that every rounding is unbiased. Two uses that share bits are not
    independent. Let U be the 16 bits of the use whose lower 8 are shared, and V those of the other
    use. A value is rounded up if U is at least a threshold. The lower 8 bits of U decide only if
    its upper 8 equal those of the threshold, which has probability 1/256. So the covariance of the
    events that the one and the other value are rounded up is at most 1/256 of the largest
    covariance of two events, 1/4.

    Args:
        words: the number of a word -> the result of :func:`random_bits` for that word.
        position: the position of the lowest of the 16 bits.
    """
    return (words[position // 32] >> np.uint32(position % 32)) & np.uint32(0xFFFF)
