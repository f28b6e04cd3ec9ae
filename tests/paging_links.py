"""Links without a GPU: one runs streams in random order, one simulates time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

POISON = 0xA5
"""The value of bytes that no copy has written yet."""


class Fault(RuntimeError):
    """The error of an injected fault."""


class _Stream:
    def __init__(self) -> None:
        self.queue: deque[Any] = deque()


class _Event:
    def __init__(self) -> None:
        self.done = False


class RandomLink:
    """Streams that queue their work and run it in any order that the events allow.

    A copy takes two turns: the first spoils the target except for half of the source, and the
    second copies the other half. Accesses to either tensor between the turns therefore read or
    leave wrong bytes.

    Args:
        seed: seed of the order.
        fault: index of the copy that fails, counted from 0; None for no fault.
        at_once: whether the fault is raised when the copy is requested; otherwise it is raised
            halfway through the copy.
    """

    def __init__(self, seed: int, fault: int | None = None, at_once: bool = False) -> None:
        self.random = random.Random(seed)
        self.fault, self.at_once, self.copies = fault, at_once, 0
        self.incoming, self.outgoing, self._current = _Stream(), _Stream(), _Stream()
        self.adopted: list[torch.Tensor] = []
        self.pinned: list[int] = []
        self.most_waiting = 0

    def current(self) -> _Stream:
        return self._current

    def copy(self, stream: _Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        number, self.copies = self.copies, self.copies + 1
        assert target.dtype == source.dtype == torch.uint8
        if number == self.fault and self.at_once:
            raise Fault(f"copy {number}")
        half = self.random.randrange(len(target) + 1)

        def begin() -> None:
            target[half:] = POISON
            target[:half] = source[:half]
            if number == self.fault:
                raise Fault(f"copy {number}")

        def end() -> None:
            target[half:] = source[half:]

        stream.queue += [begin, end]

    def launch(self, work: Callable[[], None]) -> None:
        self._current.queue.append(work)

    def record(self, stream: _Stream) -> _Event:
        event = _Event()
        stream.queue.append(lambda: setattr(event, "done", True))
        return event

    def wait(self, stream: _Stream, event: _Event) -> None:
        stream.queue.append(event)

    def _turn(self) -> None:
        streams = [self.incoming, self.outgoing, self._current]
        for stream in streams:
            while stream.queue and isinstance(stream.queue[0], _Event) and stream.queue[0].done:
                stream.queue.popleft()
        ready = [s for s in streams if s.queue and not isinstance(s.queue[0], _Event)]
        if not ready:
            assert not any(s.queue for s in streams), "deadlock: every stream waits"
            return
        self.random.choice(ready).queue.popleft()()

    def _until(self, *streams: _Stream) -> None:
        while any(stream.queue for stream in streams):
            self._turn()

    def finish(self) -> None:
        # The tests read the parameters next; copies to the host may still be pending.
        self.most_waiting = max(self.most_waiting, len(self._current.queue))
        self._until(self._current)

    def settle(self) -> None:
        self._until(self.incoming, self.outgoing)

    def recover(self) -> None:
        """Ends a fault. If it was raised at the request (at_once), queued work runs; otherwise
        queued work is dropped."""
        self.fault = None
        for stream in (self.incoming, self.outgoing, self._current):
            if self.at_once:
                self._until(stream)
            stream.queue.clear()

    def adopt(self, buffer: torch.Tensor) -> None:
        buffer.fill_(POISON)
        self.adopted.append(buffer)

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        self.pinned.append(nbytes)
        return lambda: None


class ClockLink(RandomLink):
    """Runs everything immediately, and computes when a device would have completed it.

    Args:
        rate: bytes per unit of time in each direction.
        work: time of each launch.
        latency: time that each copy takes in addition.
    """

    def __init__(self, rate: float, work: float, latency: float = 0.0) -> None:
        super().__init__(0)
        self.rate, self.work, self.latency = rate, work, latency
        self.clocks = {id(s): 0.0 for s in (self.incoming, self.outgoing, self._current)}

    def copy(self, stream: _Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        self.clocks[id(stream)] += self.latency + len(target) / self.rate

    def launch(self, work: Callable[[], None]) -> None:
        work()
        self.clocks[id(self._current)] += self.work

    def record(self, stream: _Stream) -> Any:
        return self.clocks[id(stream)]

    def wait(self, stream: _Stream, event: Any) -> None:
        self.clocks[id(stream)] = max(self.clocks[id(stream)], event)

    @property
    def now(self) -> float:
        """The time when all streams are done."""
        return max(self.clocks.values())
