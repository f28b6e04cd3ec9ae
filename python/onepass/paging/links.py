"""What moves pages between the host and a device, and in what order: streams and events.

A link is all that the ring knows of a device. Streams do what is given to them in order; an event
is a point in a stream that others can wait for. There are three streams: ``incoming``, ``outgoing``
and, for what the optimizer computes, the device's current one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch


class Link(Protocol):
    """Copies between host and device. None of the calls but settle waits for what it asks for.

    Attributes:
        incoming, outgoing: the streams of copies to the device and back.
    """

    incoming: Any
    outgoing: Any

    def current(self) -> Any:
        """The stream on which the optimizer computes now."""

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes, in the order of the stream."""

    def launch(self, work: Callable[[], None]) -> None:
        """Does work on the current stream."""

    def record(self, stream: Any) -> Any:
        """An event: all that the stream was given until now is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on waits for the event."""

    def finish(self) -> None:
        """Ends a step: what launch was given has been done as far as the host can tell."""

    def settle(self) -> None:
        """Waits until both streams of copies are done."""

    def adopt(self, buffer: torch.Tensor) -> None:
        """Makes memory of the device, new on the current stream, fit for all three streams."""

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Pins memory of the host; what it returns undoes that.

        Raises:
            RuntimeError: it cannot be pinned; says why.
        """


_PORTABLE = 1  # cudaHostRegisterPortable: for every device


class HostLink:
    """Where there are no asynchronous copies: each is done when it is asked for."""

    incoming = outgoing = None

    def current(self) -> None:
        return None

    def copy(self, stream: None, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def record(self, stream: None) -> None:
        return None

    def wait(self, stream: None, event: None) -> None:
        pass

    def finish(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def adopt(self, buffer: torch.Tensor) -> None:
        pass

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        return lambda: None


class CudaLink:
    """CUDA's streams and events; ROCm's too, which torch gives the same names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.incoming, self.outgoing = self._stream(), self._stream()

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def finish(self) -> None:
        pass

    def settle(self) -> None:
        self.incoming.synchronize()
        self.outgoing.synchronize()

    def adopt(self, buffer: torch.Tensor) -> None:
        # Its memory may have been another tensor's, which kernels of the current stream still read;
        # and it must not be another's before the copies of its last step are done.
        for stream in (self.incoming, self.outgoing):
            stream.wait_stream(self.current())
            buffer.record_stream(stream)

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        # Not torch's allocator of pinned memory: it rounds sizes up to powers of two.
        with torch.cuda.device(self._device):
            error = int(_runtime().cudaHostRegister(address, nbytes, _PORTABLE))
            if not error:
                device = self._device
                return lambda: _unpin(device, address)
            # The runtime tells of an error once more at the next launch: let that be this one.
            with suppress(RuntimeError):
                torch.empty(1, dtype=torch.uint8, device=self._device).zero_()
            raise RuntimeError(f"cudaHostRegister: CUDA error {error}")


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(device: torch.device, address: int) -> None:
    torch.cuda.synchronize(device)  # no copy may still read or write it
    _runtime().cudaHostUnregister(address)


def link_for(device: torch.device) -> Link:
    """The link of a device: CUDA's, or that of the host for any that has no such streams."""
    return CudaLink(device) if device.type == "cuda" else HostLink()
