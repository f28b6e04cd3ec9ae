"""Links: the streams and events with which pages are copied between the host and a device.

The ring accesses a device only through its link. A stream executes its work in order; other streams
can wait for an event, which marks a point in a stream. There are three streams: ``incoming``,
``outgoing``, and the device's current stream, on which the optimizer computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch


class Link(Protocol):
    """Copies between host and device. All calls except settle are asynchronous.

    Attributes:
        incoming, outgoing: the streams for copies to the device and back.
    """

    incoming: Any
    outgoing: Any

    def current(self) -> Any:
        """The device's current stream, on which the optimizer computes."""

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy of bytes on a stream."""

    def launch(self, work: Callable[[], None]) -> None:
        """Runs work, which enqueues kernels on the current stream."""

    def record(self, stream: Any) -> Any:
        """Records an event, which completes after all work enqueued on the stream so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """Makes later work on the stream wait for the event."""

    def finish(self) -> None:
        """Ends a step, after the last call of :meth:`launch`."""

    def settle(self) -> None:
        """Blocks the host until both copy streams are idle."""

    def adopt(self, buffer: torch.Tensor) -> None:
        """Makes device memory, allocated on the current stream, usable on all three streams."""

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Pins host memory.

        Args:
            address, nbytes: the memory range.

        Returns:
            A function that unpins the range.

        Raises:
            RuntimeError: the range cannot be pinned; the message gives the reason.
        """


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class HostLink:
    """The link of a device without asynchronous copies: every call completes immediately."""

    incoming = outgoing = None

    def current(self) -> None:
        """None: there are no streams."""
        return None

    def copy(self, stream: None, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes."""
        target.copy_(source)

    def launch(self, work: Callable[[], None]) -> None:
        """Runs work."""
        work()

    def record(self, stream: None) -> None:
        """None: there are no events."""
        return None

    def wait(self, stream: None, event: None) -> None:
        """Does nothing: all earlier work is complete."""

    def finish(self) -> None:
        """Does nothing."""

    def settle(self) -> None:
        """Does nothing: all copies are complete."""

    def adopt(self, buffer: torch.Tensor) -> None:
        """Does nothing: there are no streams."""

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Does nothing: synchronous copies need no pinned memory."""
        return lambda: None


class CudaLink:
    """The link of a CUDA or ROCm device; torch uses the same names for both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.incoming, self.outgoing = self._stream(), self._stream()

    def _stream(self) -> torch.cuda.Stream:
        """A new stream on the device."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        """See :meth:`Link.current`."""
        return torch.cuda.current_stream(self._device)

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        """See :meth:`Link.copy`."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], None]) -> None:
        """See :meth:`Link.launch`."""
        work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """See :meth:`Link.record`."""
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """See :meth:`Link.wait`."""
        stream.wait_event(event)

    def finish(self) -> None:
        """Does nothing: streams need no end of a step."""

    def settle(self) -> None:
        """See :meth:`Link.settle`."""
        self.incoming.synchronize()
        self.outgoing.synchronize()

    def adopt(self, buffer: torch.Tensor) -> None:
        """See :meth:`Link.adopt`."""
        # The allocator may have reused memory that kernels on the current stream still read, so the
        # copy streams wait. record_stream delays the next reuse until the last copies are done.
        for stream in (self.incoming, self.outgoing):
            stream.wait_stream(self.current())
            buffer.record_stream(stream)

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """See :meth:`Link.pin`."""
        # Do not use torch's pinned memory allocator: it rounds sizes up to powers of two.
        with torch.cuda.device(self._device):
            error = int(_runtime().cudaHostRegister(address, nbytes, _PORTABLE))
            if not error:
                device = self._device
                return lambda: _unpin(device, address)
            # The CUDA runtime reports an error again at the next launch: clear it here by a launch.
            with suppress(RuntimeError):
                torch.empty(1, dtype=torch.uint8, device=self._device).zero_()
            raise RuntimeError(f"cudaHostRegister: CUDA error {error}")


def _runtime() -> Any:
    """torch's bindings of the CUDA runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(device: torch.device, address: int) -> None:
    """Unpins the memory at an address."""
    torch.cuda.synchronize(device)  # wait for copies that use the memory
    _runtime().cudaHostUnregister(address)


def link_for(device: torch.device) -> Link:
    """The link of a device: CudaLink for CUDA and ROCm devices, HostLink for all others."""
    return CudaLink(device) if device.type == "cuda" else HostLink()
