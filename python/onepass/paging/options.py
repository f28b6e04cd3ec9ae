"""What ``paged`` may be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SMALLEST_PAGE = 1 << 14
"""Bytes: room for a block of 256 elements in every format, each tensor aligned."""

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Paging:
    """How the states of an optimizer are paged.

    Attributes:
        budget: bytes of states that may stay on each device: 0, or at least a page.
        page_bytes: bytes of states that are brought to the device, and back, at a time.
        buffers: pages that are on the device at once: one that comes, one that is worked on, one
            that goes, and one to spare.

    Raises:
        ValueError: a number that is none of these; names it.
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
                "bytes; 0, or True, keeps no states on the device"
            )


def paging_of(paged: Any) -> Paging | None:
    """What a value of ``paged`` asks for; None for False.

    Raises:
        ValueError: it is no budget: neither False, True, a number of bytes >= 0, a size such as
            "2GB" (10^9 bytes each) or "512MiB" (2^20), nor a :class:`Paging`.
    """
    if paged is False:
        return None
    if paged is True:
        return Paging()
    if isinstance(paged, Paging):
        return paged
    if type(paged) is int and paged >= 0:
        return Paging(budget=paged)
    found = _SIZE.fullmatch(paged) if isinstance(paged, str) else None
    if found is None:
        raise ValueError(
            "paged must be False, True, a budget in bytes >= 0, a size such as '2GB' or '512MiB', "
            f"or a onepass.paging.Paging; got {paged!r}"
        )
    number, unit, binary = found.groups()
    power = _UNITS[unit.upper()]
    return Paging(budget=int(float(number) * (2**power if binary else 1000 ** (power // 10))))
