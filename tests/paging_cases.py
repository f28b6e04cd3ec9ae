"""What the tests of paged states share."""

from __future__ import annotations

import onepass
from onepass.paging.options import SMALLEST_PAGE, Paging

SHAPES = [(33,), (), (5000,), (4, 5), (0,), (257,), (7001,), (300,)]
"""Small ones that share pages, one that a page holds in some formats and one that needs several."""


def total_bytes(optimizer) -> int:
    """Of all states, as an optimizer without a budget has them on the host."""
    found = onepass.paging.footprints(optimizer).values()
    return sum(footprint.host + footprint.resident for footprint in found)


def budgets(make) -> list[Paging]:
    """None, one page, half and more than all of the states of what make(paging) makes."""
    whole = total_bytes(make(Paging(page_bytes=SMALLEST_PAGE)))
    some = [0, SMALLEST_PAGE, max(whole // 2, SMALLEST_PAGE), 2 * whole + SMALLEST_PAGE]
    return [Paging(budget, SMALLEST_PAGE) for budget in some]


def paged_pages(optimizer) -> int:
    """Pages of the plan of now."""
    return sum(len(getattr(part, "_pages", ())) for part in optimizer._plan._parts)
