"""Device-specific measurements: step time, host time and memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from onepass.memory.probes import free_memory, step_growth
from onepass_tools.device_names import device_name

Step = Callable[[], Any]

SMALLEST_COPY = 64 << 20
"""The fewest bytes that a bandwidth measurement reads and writes: fewer take too little time to
measure."""
PAUSE = 0.03
"""Seconds to wait after a step on another thread pool: idle OpenMP threads spin for milliseconds
before they sleep, and would occupy a core of the next provider."""
REWARM = 0.003
"""Seconds of untimed steps before a sample if the case fits in a cache."""
HOST_STEPS = 50
HOST_SECONDS = 0.25
"""A host time is the median of a fixed number of steps, or of as many steps as fit in this many
seconds."""
CYCLES_PER_SECOND = 2.5e9
"""An upper bound of the GPU clock in Hz, used to convert the length of a backlog from seconds to
cycles."""
LONGEST_BACKLOG = 0.5
"""The longest backlog in seconds that a step is queued behind."""


class Device:
    """A CPU, timed by wall-clock time.

    Attributes:
        type: the torch device type.
        limits: the memory-bandwidth limits that are measured with the providers; see timing.py.
        smallest_copy: the minimum number of bytes that a limit moves.
        largest_copy: the maximum number of bytes, so that the buffers fit beside all providers.
        host_apart: whether the time of a step and the host time of a step differ.
    """

    type = "cpu"
    limits: tuple[str, ...] = ("copy", "in-place")
    smallest_copy = SMALLEST_COPY
    largest_copy = 1 << 32
    host_apart = False

    def unavailable(self) -> str:
        """The reason why the device is not available here; empty if it is."""
        return ""

    @property
    def name(self) -> str:
        """The device name in the results; only results with equal names are compared."""
        return device_name(torch.device(self.type))

    @property
    def driver(self) -> str | None:
        """The driver version; None for a CPU."""
        return None

    @property
    def clock_mhz(self) -> int | None:
        """The current clock in MHz; None if unknown."""
        return None

    def prepare(self, step: Step, host_us: float | None, warm: bool) -> None:
        """Prepares the device before a sample; not timed.

        If the memory of a step fits in a cache (``warm``), this takes at least one step, for REWARM
        seconds. In a training loop, the tables of the optimizer are cached and torch's threads are
        awake. Here, the previous provider has evicted the tables and the threads are asleep.
        """
        if not warm:
            return
        start = time.perf_counter()
        step()
        while time.perf_counter() - start < REWARM:
            step()

    def time(self, step: Step) -> float:
        """The wall-clock time of one step in milliseconds."""
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) / 1e6

    def rest(self, own_threads: bool) -> None:
        """Waits after a sample until foreign threads sleep, if the step has its own threads."""
        if own_threads:
            time.sleep(PAUSE)

    def synchronize(self) -> None:
        """Waits for launched work; a CPU has none."""

    def host_us(self, step: Step) -> float | None:
        """Host time of a step in microseconds; None if it equals the time of the step."""
        return None

    def extra_memory(self, step: Step) -> int | None:
        """Peak bytes of a step minus the bytes in use before it; None if unknown."""
        return step_growth(step, torch.device(self.type))

    def free(self) -> int | None:
        """Bytes that can still be allocated; None if unknown."""
        return free_memory(self.type)

    def release(self) -> None:
        """Releases cached memory of the allocator; a CPU has none."""


class Cuda(Device):
    """The current GPU, timed by events on its stream."""

    type = "cuda"
    limits = ("copy",)
    smallest_copy = 1 << 30
    largest_copy = 1 << 33
    host_apart = True

    def unavailable(self) -> str:
        """The reason why no GPU is available here; empty if one is."""
        return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"

    @property
    def driver(self) -> str | None:
        """The driver version from nvidia-smi; None if unknown."""
        return _nvidia_smi("driver_version")

    @property
    def clock_mhz(self) -> int | None:
        """The clock of the multiprocessors from nvidia-smi, in MHz; None if unknown."""
        told = _nvidia_smi("clocks.sm")
        return int(told) if told and told.isdigit() else None

    def prepare(self, step: Step, host_us: float | None, warm: bool) -> None:
        """Queues a delay on the device that is longer than the host time of the step.

        The device then never waits for the host between the two events. A step that synchronizes
        with the device does not benefit from the delay, and its wait counts as step time.
        """
        seconds = min(LONGEST_BACKLOG, 1.5e-6 * (host_us or 0.0) + 5e-4)
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]

    def time(self, step: Step) -> float:
        """Milliseconds between a CUDA event before the step and one after it."""
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def rest(self, own_threads: bool) -> None:
        """Does nothing: providers share one stream, and each sample has finished."""

    def synchronize(self) -> None:
        """Waits for all launched kernels."""
        torch.cuda.synchronize()

    def host_us(self, step: Step) -> float | None:
        """The median host time of a step in microseconds, with an empty queue before each step."""
        spent: list[float] = []
        begin = time.perf_counter()
        while len(spent) < HOST_STEPS:
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            step()
            spent.append((time.perf_counter_ns() - start) / 1e3)
            if len(spent) >= 3 and time.perf_counter() - begin > HOST_SECONDS:
                break
        torch.cuda.synchronize()
        return sorted(spent)[len(spent) // 2]

    def release(self) -> None:
        """Releases the cached memory of the CUDA allocator."""
        torch.cuda.empty_cache()


DEVICES: dict[str, Device] = {"cpu": Device(), "cuda": Cuda()}


def _nvidia_smi(field: str) -> str | None:
    """A field of the first GPU from nvidia-smi; None if unknown."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
