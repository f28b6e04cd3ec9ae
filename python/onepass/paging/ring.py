"""The ring: a few buffers on a device through which pages are streamed.

Copies to the device, work, and copies back to the host run on three different streams. Events order
the streams, so the host never waits: the work on a page waits for the page's copy to the device,
the copy back waits for the work, and the next copy into the same buffer waits for the copy back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .links import Link


class Page:
    """Bytes that are copied to the device and back together.

    Attributes:
        number: index of the page's buffer in the ring.
        copies: pairs of uint8 tensors: a range of host memory, and its range in the buffer.
        ready: a tuple with the event after which the buffer holds the page; None if the page is not
            in the buffer.
    """

    __slots__ = ("copies", "number", "ready")

    def __init__(self, number: int, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.number, self.copies = number, copies
        self.ready: Any = None


class _Buffer:
    """A buffer of the ring and its current page."""

    __slots__ = ("bytes", "free", "page")

    def __init__(self, data: torch.Tensor) -> None:
        self.bytes = data
        self.free: Any = None  # the event after which the last page is back on the host
        self.page: Page | None = None  # the page that was fetched into the buffer


class Ring:
    """Buffers on a device, and the order of copies and work.

    The pages of one run use consecutive buffers, modulo the number of buffers. Two runs must use
    the same buffer for the same bytes, unless :meth:`settle` is called between the runs.

    Args:
        link: the link of the device.
        device: the device of the buffers.
        count, nbytes: number of buffers, and size of each in bytes.
    """

    def __init__(self, link: Link, device: torch.device, count: int, nbytes: int) -> None:
        self.link, self.count, self.nbytes = link, count, nbytes
        self._memory = torch.empty(count * nbytes, dtype=torch.uint8, device=device)
        link.adopt(self._memory)
        stretches = (self._memory[i * nbytes : (i + 1) * nbytes] for i in range(count))
        self._buffers = [_Buffer(stretch) for stretch in stretches]
        self._next = 0

    @property
    def memory(self) -> torch.Tensor:
        """All buffers as one uint8 tensor."""
        return self._memory

    def assign(self) -> tuple[int, torch.Tensor]:
        """Assigns a buffer to the next page; returns the buffer's index and its bytes."""
        number = self._next
        self._next = (number + 1) % self.count
        return number, self._buffers[number].bytes

    def fetch(self, page: Page) -> None:
        """Starts to copy a page to its buffer, unless the page was already fetched."""
        buffer, link = self._buffers[page.number], self.link
        if buffer.page is page and page.ready is not None:
            return
        if buffer.page is not None:
            buffer.page.ready = None  # fetched but not used: the host copy is still valid
        buffer.page = page
        if buffer.free is not None:
            link.wait(link.incoming, buffer.free)
        for host, device in page.copies:
            link.copy(link.incoming, device, host)
        page.ready = (link.record(link.incoming),)

    def start(self, pages: Sequence[Page]) -> None:
        """Starts to copy the first pages of a run; one buffer stays free."""
        for page in pages[: self.count - 1]:
            self.fetch(page)

    def run(self, pages: Sequence[Page], work: Callable[[int], None]) -> None:
        """Calls work(i) for each page i while the page is on the device."""
        ahead = self.count - 1
        self.start(pages)
        for i, page in enumerate(pages):
            if i + ahead < len(pages):
                # It reuses the buffer of the previous page, which is being copied back.
                self.fetch(pages[i + ahead])
            self._work(page, i, work)
        self.link.finish()

    def _work(self, page: Page, i: int, work: Callable[[int], None]) -> None:
        """Runs work(i) after the page's copy to the device, then starts the copy back."""
        buffer, link = self._buffers[page.number], self.link
        link.wait(link.current(), page.ready[0])
        link.launch(lambda: work(i))
        link.wait(link.outgoing, link.record(link.current()))
        for host, device in page.copies:
            link.copy(link.outgoing, host, device)
        buffer.free = link.record(link.outgoing)
        buffer.page, page.ready = None, None

    def discard(self) -> None:
        """Discards pages that were fetched but not used, because the host data may change."""
        for buffer in self._buffers:
            if buffer.page is not None:
                buffer.page.ready = None
            buffer.page = None

    def settle(self) -> None:
        """Waits until all pages are back on the host."""
        self.link.settle()
        for buffer in self._buffers:
            buffer.free = None
