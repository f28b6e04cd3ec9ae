"""CudaLink without CUDA: the calls that it makes, and that the installed torch has them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from onepass.paging import links
from onepass.paging.links import CudaLink, HostLink, link_for

DEVICE = torch.device("cuda", 1)


class Torch:
    """Replaces torch: streams with the same signatures, and a runtime that can return errors."""

    RuntimeError = RuntimeError
    uint8 = torch.uint8

    def __init__(self) -> None:
        self.log: list[object] = []
        self.now = self.stream_of("current")
        self.within = self.now
        self.registered: dict[int, int] = {}
        self.error = 0
        self.cuda = SimpleNamespace(
            Stream=lambda device: self.stream_of(device),
            Event=torch.cuda.Event,
            current_stream=lambda device: self.now,
            stream=self.entered,
            device=self.entered,
            cudart=lambda: self,
            synchronize=lambda device: self.log.append(("synchronize", device)),
        )
        self.device, self.Tensor = torch.device, torch.Tensor

    def stream_of(self, name):
        stream = create_autospec(torch.cuda.Stream, instance=True)
        stream.name = name
        stream.record_event.side_effect = lambda: ("event", stream)
        return stream

    @contextmanager
    def entered(self, what):
        before, self.within = self.within, what
        yield
        self.within = before

    def empty(self, *shape, dtype, device):
        self.log.append(("launch", device))
        return torch.empty(*shape, dtype=dtype)

    def cudaHostRegister(self, address, nbytes, flags):
        assert (self.within, flags) == (DEVICE, 1)
        if not self.error:
            self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]
        self.log.append("unregistered")


@pytest.fixture
def fake(monkeypatch):
    made = Torch()
    monkeypatch.setattr(links, "torch", made)
    return made


def test_streams_and_events(fake):
    link = CudaLink(DEVICE)
    assert link.incoming is not link.outgoing
    assert link.current() is fake.now
    event = link.record(link.incoming)
    assert event == ("event", link.incoming)
    link.wait(link.current(), event)
    fake.now.wait_event.assert_called_once_with(event)
    link.settle()
    link.incoming.synchronize.assert_called_once_with()
    link.outgoing.synchronize.assert_called_once_with()
    done = []
    link.launch(lambda: done.append(1))
    assert done == [1]


def test_copies_run_asynchronously_on_their_stream(fake):
    link = CudaLink(DEVICE)
    target, asked = torch.zeros(4), []

    class Target:
        def copy_(self, source, non_blocking=False):
            asked.append((fake.within, non_blocking))
            target.copy_(source)

    link.copy(link.outgoing, Target(), torch.ones(4))
    assert asked == [(link.outgoing, True)]
    assert fake.within is fake.now


def test_new_buffers_belong_to_all_three_streams(fake):
    link, buffer = CudaLink(DEVICE), create_autospec(torch.Tensor, instance=True)
    link.adopt(buffer)
    for stream in (link.incoming, link.outgoing):
        stream.wait_stream.assert_called_once_with(fake.now)
        buffer.record_stream.assert_any_call(stream)


def test_pinning(fake):
    link = CudaLink(DEVICE)
    undo = link.pin(4096, 8192)
    assert fake.registered == {4096: 8192}
    undo()
    # Memory is unregistered only after every copy has completed.
    assert fake.log == [("synchronize", DEVICE), "unregistered"]
    fake.error = 2
    fake.log.clear()
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        link.pin(4096, 8192)
    assert fake.log == [("launch", DEVICE)]  # clears the error that the runtime holds


def test_link_matches_the_device_type():
    assert isinstance(link_for(torch.device("cpu")), HostLink)
    assert isinstance(link_for(torch.device("meta")), HostLink)
