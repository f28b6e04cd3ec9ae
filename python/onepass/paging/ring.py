"""The ring: a few buffers on a device, through which pages stream.

Copies in, work and copies out are each given to a stream of their own. What has to wait for what is
said by events, so that the host waits for nothing, and the order in which streams get on does not
matter: work on a page waits for its copy in, its copy out for the work, and the next copy into the
same buffer for the copy out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .links import Link


class Page:
    """Bytes that go to the device and back together.

    Attributes:
        number: of its buffer in the ring.
        copies: pairs of stretches, uint8: on the host, in the buffer.
        ready: the event after which the buffer holds it; None while it does not.
    """

    __slots__ = ("copies", "number", "ready")

    def __init__(self, number: int, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.number, self.copies = number, copies
        self.ready: Any = None


class _Buffer:
    __slots__ = ("bytes", "free", "page")

    def __init__(self, data: torch.Tensor) -> None:
        self.bytes = data
        self.free: Any = None  # the event after which its last page is back on the host
        self.page: Page | None = None  # that it holds, or will


class Ring:
    """Buffers on a device, and the order of what is done with them.

    The pages of one run have consecutive buffers, modulo their number. Two runs must not have the
    same bytes in different buffers, unless :meth:`settle` was called between them.

    Args:
        link: of the device.
        count, nbytes: of the buffers.
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
        """All buffers, one tensor."""
        return self._memory

    def assign(self) -> tuple[int, torch.Tensor]:
        """The buffer of the next page that is made: its number, its bytes."""
        number = self._next
        self._next = (number + 1) % self.count
        return number, self._buffers[number].bytes

    def fetch(self, page: Page) -> None:
        """Starts to copy a page to its buffer, unless it is there, or on the way."""
        buffer, link = self._buffers[page.number], self.link
        if buffer.page is page and page.ready is not None:
            return
        if buffer.page is not None:
            buffer.page.ready = None  # fetched, and not used: nothing of it has changed
        buffer.page = page
        if buffer.free is not None:
            link.wait(link.incoming, buffer.free)
        for host, device in page.copies:
            link.copy(link.incoming, device, host)
        page.ready = (link.record(link.incoming),)

    def start(self, pages: Sequence[Page]) -> None:
        """Starts to copy the first pages of a run, as many as leave a buffer to spare."""
        for page in pages[: self.count - 1]:
            self.fetch(page)

    def run(self, pages: Sequence[Page], work: Callable[[int], None]) -> None:
        """Does work(i) on every page i while it is on the device."""
        ahead = self.count - 1
        self.start(pages)
        for i, page in enumerate(pages):
            if i + ahead < len(pages):
                # Its buffer is that of the page before this one, which is on its way back.
                self.fetch(pages[i + ahead])
            self._work(page, i, work)
        self.link.finish()

    def _work(self, page: Page, i: int, work: Callable[[int], None]) -> None:
        buffer, link = self._buffers[page.number], self.link
        link.wait(link.current(), page.ready[0])
        link.launch(lambda: work(i))
        link.wait(link.outgoing, link.record(link.current()))
        for host, device in page.copies:
            link.copy(link.outgoing, host, device)
        buffer.free = link.record(link.outgoing)
        buffer.page, page.ready = None, None

    def discard(self) -> None:
        """Forgets pages that were fetched and not used: what the host has may change."""
        for buffer in self._buffers:
            if buffer.page is not None:
                buffer.page.ready = None
            buffer.page = None

    def settle(self) -> None:
        """Waits until the host has every page back."""
        self.link.settle()
        for buffer in self._buffers:
            buffer.free = None
