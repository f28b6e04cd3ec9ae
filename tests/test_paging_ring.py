"""The page schedule: each page is processed once and complete, in any order of completion."""

from __future__ import annotations

import pytest
import torch

from onepass.paging.links import HostLink
from onepass.paging.ring import Page, Ring

from .paging_links import ClockLink, Fault, RandomLink
from .support.thorough import THOROUGH

CPU = torch.device("cpu")
SIZE = 64
SEEDS = 250 if THOROUGH else 80


def pages_of(ring: Ring, host: torch.Tensor) -> list[Page]:
    """One page for each row of host, each copied in two parts."""
    pages = []
    for row in host:
        number, buffer = ring.assign()
        cut = len(row) // 3
        copies = [(row[:cut], buffer[:cut]), (row[cut:], buffer[cut : len(row)])]
        pages.append(Page(number, copies))
    return pages


def add_one(ring: Ring, pages: list[Page], seen: list[int]):
    """A launch that checks that all bytes of a page are equal and then adds 1 to each."""

    def work(i: int) -> None:
        for _, device in pages[i].copies:
            assert bool((device == device[0]).all()), f"page {i} is not whole"
            device += 1
        seen.append(i)

    return work


def rows(count: int) -> torch.Tensor:
    """Rows filled with 10, 20, 30, ...: three increments never turn one row into another."""
    return (10 * torch.arange(1, count + 1, dtype=torch.uint8))[:, None].repeat(1, SIZE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("block", range(4))
def test_any_order_of_completion(count, block):
    """SEEDS per block: three steps over all pages, with or without prefetching and settling."""
    for seed in range(SEEDS * block, SEEDS * (block + 1)):
        link = RandomLink(seed)
        ring = Ring(link, CPU, count, SIZE)
        host = rows(seed % 9)
        before, pages = host.clone(), pages_of(ring, host)
        for _ in range(3):
            seen: list[int] = []
            if link.random.random() < 0.5:
                ring.start(pages)
            ring.run(pages, add_one(ring, pages, seen))
            assert seen == list(range(len(pages)))
            if link.random.random() < 0.5:
                ring.settle()
        ring.settle()
        assert torch.equal(host, before + 3), f"seed {seed}"
        # The ring allocates its buffers once, and each page is copied in and out once per step.
        assert [len(buffer) for buffer in link.adopted] == [count * SIZE]
        assert link.copies == 3 * 2 * 2 * len(pages)


def without_waits(link: RandomLink, stream: str) -> None:
    """Breaks the schedule: this stream ignores waits."""
    known = link.wait
    link.wait = lambda s, event: None if s is getattr(link, stream) else known(s, event)


@pytest.mark.parametrize("stream", ["incoming", "outgoing", "_current"])
def test_random_orders_detect_a_missing_wait(stream):
    found = 0
    for seed in range(20):
        link = RandomLink(seed)
        without_waits(link, stream)
        ring = Ring(link, CPU, 3, SIZE)
        host = rows(8)
        before, pages = host.clone(), pages_of(ring, host)
        try:
            for _ in range(2):
                ring.run(pages, add_one(ring, pages, []))
            ring.settle()
        except AssertionError:
            found += 1
        else:
            found += not torch.equal(host, before + 2)
    assert found >= 5  # of 20 seeds; in the others the random order happens to be correct


def test_plans_that_share_a_ring():
    """One plan for each parameter, as in gradient release; each run prefetches the next plan."""
    for seed in range(SEEDS):
        link = RandomLink(seed)
        ring = Ring(link, CPU, 3, SIZE)
        hosts = [rows(n) for n in (1, 2, 1, 4, 1, 1)]
        before = [host.clone() for host in hosts]
        plans = [pages_of(ring, host) for host in hosts]
        for _ in range(3):
            order = list(range(len(plans)))
            if link.random.random() < 0.5:
                link.random.shuffle(order)  # then pages were prefetched in vain
            for i in order:
                ring.run(plans[i], add_one(ring, plans[i], []))
                ring.start(plans[(i + 1) % len(plans)])
            ring.discard()
        ring.settle()
        assert all(torch.equal(h, b + 3) for h, b in zip(hosts, before, strict=True)), seed


def test_discard_invalidates_prefetched_pages():
    link = RandomLink(1)
    ring = Ring(link, CPU, 3, SIZE)
    host = rows(2)
    pages = pages_of(ring, host)
    ring.start(pages)
    ring.settle()
    host += 100
    before = host.clone()
    ring.discard()
    ring.run(pages, add_one(ring, pages, []))
    ring.settle()
    assert torch.equal(host, before + 1)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_fault_in_any_copy_surfaces(count, at_once):
    for fault in range(20):
        link = RandomLink(fault, fault, at_once)
        ring = Ring(link, CPU, count, SIZE)
        host = rows(5)
        pages = pages_of(ring, host)
        with pytest.raises(Fault, match=f"copy {fault}"):  # noqa: PT012
            ring.run(pages, add_one(ring, pages, []))
            ring.settle()


def test_copies_and_work_overlap():
    """A step takes the time of the slowest of copies in, work and copies out, plus two pages."""
    for work in (0.5, 1.0, 2.0):
        link = ClockLink(rate=SIZE, work=work)  # 1 unit of time per page and direction
        ring = Ring(link, CPU, 4, SIZE)
        pages = pages_of(ring, rows(20))
        ring.run(pages, add_one(ring, pages, []))
        assert link.now == pytest.approx(20 * max(1.0, work) + (2.0 if work >= 1 else 1 + work))


def test_two_buffers_cannot_overlap_both_copies_and_work():
    """Copies in, work and copies out overlap fully only with at least three buffers."""
    times = []
    for count in (1, 2, 3, 4):
        link = ClockLink(rate=SIZE, work=1.0)
        ring = Ring(link, CPU, count, SIZE)
        pages = pages_of(ring, rows(20))
        ring.run(pages, add_one(ring, pages, []))
        times.append(link.now)
    assert times[0] == 60.0
    assert times[1] > 1.3 * times[2]
    assert times[2] == times[3] == 22.0


def test_host_link_copies_immediately():
    ring = Ring(HostLink(), CPU, 4, SIZE)
    host = rows(7)
    before, pages = host.clone(), pages_of(ring, host)
    ring.run(pages, add_one(ring, pages, []))
    assert torch.equal(host, before + 1)
