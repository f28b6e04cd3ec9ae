"""Helpers of the tests of paged states."""

from __future__ import annotations

import onepass
from onepass.paging.options import SMALLEST_PAGE, Paging

SHAPES = [(33,), (), (5000,), (4, 5), (0,), (257,), (7001,), (300,)]
"""Small parameters that share pages, one that fits a page in some formats only, and one that needs
several pages."""


def total_bytes(optimizer) -> int:
    """The size of all states on the host, as an optimizer with a budget of 0 stores them."""
    found = onepass.paging.footprints(optimizer).values()
    return sum(footprint.host + footprint.resident for footprint in found)


def budgets(make) -> list[Paging]:
    """Budgets to test: zero, one page, half and more than all states of make(paging)."""
    whole = total_bytes(make(Paging(page_bytes=SMALLEST_PAGE)))
    some = [0, SMALLEST_PAGE, max(whole // 2, SMALLEST_PAGE), 2 * whole + SMALLEST_PAGE]
    return [Paging(budget, SMALLEST_PAGE) for budget in some]


def paged_pages(optimizer) -> int:
    """The number of pages of the current plan."""
    return sum(len(getattr(part, "_pages", ())) for part in optimizer._plan._parts)
