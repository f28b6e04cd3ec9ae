"""A checksum of weights that can be added over shards.

It detects weights that differ by mistake. It is not a cryptographic hash.
"""

from __future__ import annotations

import torch

from .numpy_codec import flat
from .whole_positions import Place

_CHUNK = 1 << 20  # elements; temporary tensors have 8 bytes an element
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd constants of SplitMix64 (Steele et al., 2014), as signed integers.
_GAMMA, _MIX_1, _MIX_2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def codes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bits of a tensor of 1, 2, 4 or 8 bytes per element as signed integers; a view."""
    kind = _INTEGER[tensor.element_size()]
    return tensor.detach() if tensor.dtype == kind else tensor.detach().view(kind)


def _shifted(value: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right; torch shifts signed integers arithmetically."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def checksum(tensor: torch.Tensor, place: Place) -> int:
    """The sum of mix(position, code) over the elements of a local tensor, modulo 2^64.

    mix is SplitMix64's output function of ``position * gamma + code``. The result does not depend
    on the memory order. The checksums of the shards of a parameter add up to that of the whole.

    Args:
        tensor: a dense tensor of 1, 2, 4 or 8 bytes per element, on any device.
        place: its place in the whole parameter.

    Returns:
        An integer in [0, 2^64). The call waits for the device.
    """
    codes = flat(codes_of(tensor))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(codes), _CHUNK):
        end = min(begin + _CHUNK, len(codes))
        at = place.of(torch.arange(begin, end, dtype=torch.int64, device=tensor.device))
        value = at * _GAMMA + codes[begin:end]
        value = (value ^ _shifted(value, 30)) * _MIX_1
        value = (value ^ _shifted(value, 27)) * _MIX_2
        total += (value ^ _shifted(value, 31)).sum()
    return int(total) % (1 << 64)
