"""Plans of the cuda backend that run on several streams, on the stand-in.

The stand-in records which launches the host has waited for.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import onepass

from . import cuda_shim
from .cases import make_params, same_bits, set_grads
from .support.targets import STAND_IN, needs_stand_in

pytestmark = [needs_stand_in, pytest.mark.usefixtures("cuda_stand_in")]

UNLOADING, INVALID_HANDLE = 4, 400  # values of cudaError_t


@pytest.fixture(autouse=True)
def _shim(monkeypatch):
    gc.collect()
    cuda_shim.set_devices((90, 0), (90, 0))
    cuda_shim.forget()
    yield
    cuda_shim.set_devices()
    cuda_shim.select()


class Steps:
    """An optimizer that takes steps on the given streams."""

    def __init__(self, **options):
        self.params = make_params([(33,), (2085,)], torch.float32, 1)
        self.optimizer = onepass.AdamW(self.params, backend=STAND_IN, **options)

    def __call__(self, *streams, dtype=torch.float32):
        for seed, stream in enumerate(streams):
            set_grads(self.params, dtype, seed)
            cuda_shim.select(0, stream)
            self.optimizer.step()

    def free(self, device=0):
        """Frees the plan while another device and the default stream are current."""
        (part,) = self.optimizer._plan._parts
        freed = weakref.ref(part.prepared)
        del part
        cuda_shim.select(device)
        self.optimizer._plan = None
        self.optimizer.captured.clear()
        gc.collect()
        assert freed() is None


def test_a_plan_that_ran_on_one_stream_is_freed_without_waiting():
    events, steps = cuda_shim.events(), Steps()
    steps(3, 3, 3)
    assert cuda_shim.pending(3) == 6
    steps.free()
    assert cuda_shim.pending(3) == 6
    assert cuda_shim.last_wait() == (-1, -1)
    assert cuda_shim.events() == events


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("streams", [(0, 1), (0, 1, 2, 1), (1, 0, 2, 3, 1), (0, 1, 2, 3, 4, 0)])
def test_freeing_a_plan_waits_for_its_side_streams_with_its_device_current(streams, options):
    events, steps = cuda_shim.events(), Steps(**options)
    steps(*streams)
    steps.free(device=1)
    for stream in set(streams) - {streams[0]}:
        assert cuda_shim.pending(stream) == 0
    assert cuda_shim.last_wait() == (0, 0)
    assert cuda_shim.current_device() == 1
    assert cuda_shim.events() == events


def test_a_stream_that_reuses_the_handle_of_a_destroyed_one_is_told_apart():
    """Recording the first stream's event again would lose its earlier launches."""
    steps = Steps()
    steps(0, 1)
    launches = cuda_shim.pending(1)
    cuda_shim.rename_stream(1, 9)  # launches of the destroyed stream still run
    steps(1)
    assert cuda_shim.pending(9) == launches
    steps.free()
    assert cuda_shim.pending(9) == cuda_shim.pending(1) == 0


def test_norms_on_a_side_stream_are_waited_for():
    steps = Steps()
    steps(0)
    (part,) = steps.optimizer.planned()._parts
    cuda_shim.select(0, 1)
    part.backend.norm(part.prepared)
    del part
    steps.free()
    assert cuda_shim.pending(1) == 0
    assert cuda_shim.last_wait() == (0, 0)


def test_freeing_a_plan_does_not_disturb_a_capture():
    """The garbage collector may free a plan while another thread captures."""
    steps = Steps()
    steps(0, 1)
    with cuda_shim.Capture():
        steps.free()
    assert not cuda_shim.capture_broken()
    assert cuda_shim.pending(1) == 0
    assert cuda_shim.capture_mode() == 0


@pytest.mark.parametrize("before", [(0,), (0, 1)], ids=["own stream", "side stream"])
def test_no_event_is_recorded_within_a_capture(before, monkeypatch):
    events, steps = cuda_shim.events(), Steps()
    steps(*before)
    capture = cuda_shim.Capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture.active)
    with capture:
        steps(1)
    assert not cuda_shim.capture_broken()
    assert cuda_shim.events() == events + (len(before) > 1)
    steps.free()
    assert cuda_shim.events() == events


def test_a_table_allocated_on_a_side_stream_outlives_launches_on_the_first(monkeypatch):
    """A dtype change makes a captured plan allocate a new table on the current stream."""
    steps = Steps()
    steps(0)
    capture = cuda_shim.Capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture.active)
    with capture:
        steps(0)
    cuda_shim.forget()
    steps(1, 0, dtype=torch.bfloat16)
    steps.free()
    assert cuda_shim.pending(0) == cuda_shim.pending(1) == 0


@pytest.mark.parametrize("after", [0, 1], ids=["tables", "sweep"])
def test_where_no_event_can_be_recorded_the_step_waits(after):
    """A step on a side stream records two events: after copying its tables and after the sweep."""
    steps = Steps()
    steps(0)
    before = [p.detach().clone() for p in steps.params]
    cuda_shim.fail("cudaEventRecord", INVALID_HANDLE, after)
    steps(1)
    assert (cuda_shim.pending(1) == 0) == bool(after)
    assert not any(map(same_bits, before, (p.detach() for p in steps.params)))
    steps.free()
    assert cuda_shim.pending(1) == 0


def test_errors_while_a_plan_is_freed_are_ignored():
    """The driver may be shutting down when the process ends."""
    steps = Steps()
    steps(0, 1)
    cuda_shim.fail("cudaEventSynchronize", UNLOADING)
    steps.free()
    assert cuda_shim.last_wait() == (0, 0)
    steps = Steps()
    steps(0, 1)
    cuda_shim.set_devices(driver=UNLOADING)
    steps.free()
