"""The values of the ``paged`` keyword."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SMALLEST_PAGE = 1 << 14
"""Bytes of the smallest page: a block of 256 elements fits in every format, with each tensor
aligned."""

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Paging:
    """How the states of an optimizer are paged.

    Attributes:
        budget: bytes of states that may stay on each device: 0, or at least one page.
        page_bytes: size of a page in bytes; states are copied to the device and back by pages.
        buffers: number of pages on the device at the same time. The default of 4 allows one page
            that is copied in, one that is updated, one that is copied out, and a spare one.

    Raises:
        ValueError: a value is not an integer or is out of range; the message names it.
    """

    budget: int = 0
    page_bytes: int = 32 << 20
    buffers: int = 4

    def __post_init__(self) -> None:
        for name, least in (("budget", 0), ("page_bytes", SMALLEST_PAGE), ("buffers", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"paged: {name} must be an integer >= {least}; got {value!r}")
        if 0 < self.budget < self.page_bytes:
            raise ValueError(
                f"paged: a budget of {self.budget} bytes is below one page, {self.page_bytes} "
                "bytes; use 0 or True to keep no states on the device"
            )


def paging_of(paged: Any) -> Paging | None:
    """The :class:`Paging` for a value of ``paged``; None for False.

    Args:
        paged: False, True (a budget of 0 bytes), a number of bytes >= 0, a :class:`Paging`, or a
            size such as "2GB" (1 GB = 10^9 bytes) or "512MiB" (1 MiB = 2^20 bytes).

    Raises:
        ValueError: the value is none of these.
    """
    if paged is False:
        return None
    if paged is True:
        return Paging()
    if isinstance(paged, Paging):
        return paged
    if type(paged) is int and paged >= 0:
        return Paging(budget=paged)
    budget = bytes_of(paged)
    if budget is None:
        raise ValueError(
            "paged must be False, True, a budget in bytes >= 0, a size such as '2GB' or '512MiB', "
            f"or a onepass.paging.Paging; got {paged!r}"
        )
    return Paging(budget=budget)


def bytes_of(size: Any) -> int | None:
    """The bytes of a size such as "2GB" or "512MiB"; None if the value is not such a string."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        return None
    number, unit, binary = found.groups()
    power = _UNITS[unit.upper()]
    return int(float(number) * (2**power if binary else 1000 ** (power // 10)))
