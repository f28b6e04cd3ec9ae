"""Splits entries into pages: a page holds a piece of a large parameter or many small parameters.

A backend prepares each page as an ordinary plan. The states of its entries are views of a ring
buffer; its parameters are whole parameters or pieces of them. A piece begins at a block boundary
and records the index of its first element, so codes and random bits are the same as without paging.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..engine.backends.base import WORD, Entry
from .ring import Page, Ring
from .slabs import Slab, Slabs, aligned

UNIT = 256
"""Pieces of a parameter begin at multiples of this many elements, a multiple of every format's
block."""


class Span(NamedTuple):
    """A range of elements of an entry, in memory order.

    Attributes:
        entry: position of the entry in the list.
        start, stop: the element range.
        whole: whether the range covers the whole entry.
    """

    entry: int
    start: int
    stop: int
    whole: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements of this range in the parameter or its gradient, as a view."""
        if self.whole:
            return tensor
        tensor = tensor.detach()  # torch cannot swap a parameter that has an autograd view
        offset = tensor.storage_offset() + self.start
        return tensor.as_strided((self.stop - self.start,), (1,), offset)


@dataclass(frozen=True)
class _Stored:
    """A state tensor of an entry: its field and slot, and the number of elements per item."""

    field: str
    slot: int
    tensor: torch.Tensor
    per: int

    def stretch(self, start: int, stop: int) -> tuple[int, int]:
        """The byte range that stores elements start to stop."""
        size = self.tensor.element_size()
        return start // self.per * size, -(-stop // self.per) * size


def _stored(entry: Entry) -> Iterator[_Stored]:
    """The state tensors of an entry in allocation order, which is also their order in slabs."""
    for slot, codes in entry.states.items():
        yield _Stored("states", slot, codes, entry.format_of(slot).packed)
        if slot in entry.scales:
            yield _Stored("scales", slot, entry.scales[slot], entry.format_of(slot).block)
    if entry.companion is not None:
        yield _Stored("companion", 0, entry.companion, 1)
    if entry.ema is not None:
        yield _Stored("ema", 0, entry.ema, 1)


def entry_bytes(entry: Entry, start: int, stop: int) -> int:
    """The most bytes that elements start to stop of an entry can take in a page."""
    stretches = (stored.stretch(start, stop) for stored in _stored(entry))
    return sum(aligned(last - first) for first, last in stretches)


def cut(entries: Sequence[Entry], room: int) -> list[list[Span]]:
    """The spans of each page; only entries that are larger than a page are cut.

    Args:
        entries: the paged entries.
        room: bytes of a page.
    """
    pages: list[list[Span]] = [[]]
    left = room
    for i, entry in enumerate(entries):
        numel = entry.param.numel()
        size = entry_bytes(entry, 0, numel)
        if size <= room:
            if size > left:
                pages.append([])
                left = room
            pages[-1].append(Span(i, 0, numel, True))
            left -= size
            continue
        start = 0
        # Bytes of UNIT elements, and the most bytes that alignment can add.
        stretches = [stored.stretch(0, UNIT) for stored in _stored(entry)]
        unit = sum(last - first for first, last in stretches)
        slack = len(stretches) * (aligned(1) - 1)
        while start < numel:
            stop = min(start + (left - slack) // unit * UNIT, numel)
            if stop <= start:
                pages.append([])
                left = room
                continue
            pages[-1].append(Span(i, start, stop, False))
            left -= entry_bytes(entry, start, stop)
            start = stop
    return [page for page in pages if page]


class _Layout:
    """Assigns slab ranges to buffer offsets; ranges that are adjacent in a slab stay adjacent."""

    def __init__(self) -> None:
        self.end = 0
        # Slab, start and end byte in the slab, start byte in the buffer.
        self.runs: list[tuple[Slab, int, int, int]] = []
        self._slab: Slab | None = None
        self._first = self._last = self._at = 0
        self._ended = False

    def place(self, slab: Slab, first: int, last: int, ends: bool) -> int:
        """Places a byte range of a slab and returns its start byte in the buffer.

        Args:
            slab: the slab.
            first, last: start and end byte in the slab.
            ends: whether the range ends with its tensor, so that only padding follows.
        """
        if slab is not self._slab or first != (aligned(self._last) if self._ended else self._last):
            self.close()
            self._slab, self._first, self._at = slab, first, aligned(self.end)
        self._last, self._ended = last, ends
        self.end = self._at + last - self._first
        return self._at + first - self._first

    def close(self) -> None:
        """Ends the current run of adjacent ranges."""
        if self._slab is not None:
            self.runs.append((self._slab, self._first, self._last, self._at))
        self._slab = None


@dataclass
class Cut:
    """A page with its entries.

    Attributes:
        page: the bytes to copy.
        spans: the element ranges in the page.
        entries: one entry for each span, with states in the buffer; a backend prepares them.
    """

    page: Page
    spans: list[Span]
    entries: list[Entry]


def _bits_of(entry: Entry, span: Span) -> torch.Tensor | None:
    """The record of changes of a span, which stays on the device."""
    if entry.changed is None or span.whole:
        return entry.changed
    return entry.changed[span.start // WORD : -(-span.stop // WORD)]


def make_pages(entries: Sequence[Entry], slabs: Slabs, ring: Ring) -> list[Cut]:
    """Makes the pages of entries with states in slabs, in consecutive buffers of a ring."""
    return [_make(entries, spans, slabs, ring) for spans in cut(entries, ring.nbytes)]


def _make(entries: Sequence[Entry], spans: list[Span], slabs: Slabs, ring: Ring) -> Cut:
    """Makes one page in the next buffer of a ring."""
    number, buffer = ring.assign()
    layout, made = _Layout(), []
    for span in spans:
        entry = entries[span.entry]
        views: dict[str, dict[int, torch.Tensor]] = {}
        for stored in _stored(entry):
            found = slabs.find(stored.tensor)
            assert found is not None
            slab, base = found
            first, last = stored.stretch(span.start, span.stop)
            ends = span.stop == entry.param.numel()
            at = layout.place(slab, base + first, base + last, ends)
            view = buffer[at : at + last - first].view(stored.tensor.dtype)
            if span.whole:
                view = view.as_strided(stored.tensor.shape, stored.tensor.stride())
            views.setdefault(stored.field, {})[stored.slot] = view
        made.append(
            replace(
                entry,
                param=span.of(entry.param),
                first=entry.first + span.start,
                states=views.get("states", {}),
                scales=views.get("scales", {}),
                companion=views.get("companion", {}).get(0),
                ema=views.get("ema", {}).get(0),
                changed=_bits_of(entry, span),
            )
        )
    layout.close()
    assert layout.end <= len(buffer)
    copies = [
        (slab.bytes(first, last), buffer[at : at + last - first])
        for slab, first, last, at in layout.runs
    ]
    return Cut(Page(number, copies), spans, made)
