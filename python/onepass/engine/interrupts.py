"""Defers Ctrl-C (SIGINT) while a step changes tensors."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Uninterrupted:
    """A context manager that defers SIGINT: the signal handler runs when the block ends.

    Python can run a signal handler between any two bytecode instructions of the main thread, and
    the default handler raises KeyboardInterrupt. The context manager does nothing in other threads
    and if SIGINT has no Python handler.
    """

    __slots__ = ("_handler", "_pending")

    def __enter__(self) -> None:
        self._pending: tuple[int, FrameType | None] | None = None
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._pending = number, frame

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._pending is not None and callable(self._handler):
                self._handler(*self._pending)
