"""What is different between devices: how a step is timed, its host time, and its memory."""

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
"""Bytes read and written by a limit at least: fewer take too little time to be a bandwidth."""
PAUSE = 0.03
"""Seconds after a step on a foreign pool of threads: idle OpenMP threads spin for milliseconds
before they sleep, and would take a core from the next provider."""
REWARM = 0.003
"""Seconds of untimed steps before a sample of a case that fits in a cache."""
HOST_STEPS = 50
HOST_SECONDS = 0.25
"""A host time is the median of so many steps, or of as many as fit into this time."""
CYCLES_PER_SECOND = 2.5e9
"""Of the clock that a backlog counts in; no GPU of today runs faster, so it lasts long enough."""
LONGEST_BACKLOG = 0.5
"""Seconds of work, at most, that a step is queued behind."""


class Device:
    """A processor, timed by its clock on the wall.

    Attributes:
        type: torch's name of it.
        limits: what memory allows, measured beside the providers (timing.py says how).
        smallest_copy: bytes of a limit at least.
        largest_copy: at most, so that it fits beside all providers.
        host_apart: whether the time of a step and the time that it keeps the host are two things.
    """

    type = "cpu"
    limits: tuple[str, ...] = ("copy", "in-place")
    smallest_copy = SMALLEST_COPY
    largest_copy = 1 << 32
    host_apart = False

    def unavailable(self) -> str:
        """Why there is none here; empty when there is."""
        return ""

    @property
    def name(self) -> str:
        """As in the results: only lines of one name are compared."""
        return device_name(torch.device(self.type))

    @property
    def driver(self) -> str | None:
        """The version of its driver, where it has one."""
        return None

    @property
    def clock_mhz(self) -> int | None:
        """The clock that it runs at now, where it tells."""
        return None

    def prepare(self, step: Step, host_us: float | None, warm: bool) -> None:
        """What comes before a sample, untimed.

        Steps for REWARM seconds, at least one, where a step's memory fits in a cache. In a loop of
        one optimizer's steps its tables are in a cache and torch's threads awake. Here the provider
        before it has evicted the tables and let the threads go to sleep.
        """
        if not warm:
            return
        start = time.perf_counter()
        step()
        while time.perf_counter() - start < REWARM:
            step()

    def time(self, step: Step) -> float:
        """Milliseconds of one step."""
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) / 1e6

    def rest(self, own_threads: bool) -> None:
        """What comes after a sample; own_threads: the step has threads besides torch's."""
        if own_threads:
            time.sleep(PAUSE)

    def synchronize(self) -> None:
        """Waits for what was launched."""

    def host_us(self, step: Step) -> float | None:
        """Microseconds that a step keeps the host; None where that is the time of the step."""
        return None

    def extra_memory(self, step: Step) -> int | None:
        """Bytes that a step needs at most beyond those in use before it; None if unknown."""
        return step_growth(step, torch.device(self.type))

    def free(self) -> int | None:
        """Bytes that can still be allocated; None if unknown."""
        return free_memory(self.type)

    def release(self) -> None:
        """Gives back what the allocator keeps."""


class Cuda(Device):
    """The current GPU, timed by events on its stream."""

    type = "cuda"
    limits = ("copy",)
    smallest_copy = 1 << 30
    largest_copy = 1 << 33
    host_apart = True

    def unavailable(self) -> str:
        """Why there is none here; empty when there is."""
        return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"

    @property
    def driver(self) -> str | None:
        """As nvidia-smi tells; None where it does not."""
        return _nvidia_smi("driver_version")

    @property
    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, as nvidia-smi tells; None where it does not."""
        told = _nvidia_smi("clocks.sm")
        return int(told) if told and told.isdigit() else None

    def prepare(self, step: Step, host_us: float | None, warm: bool) -> None:
        """A backlog that lasts longer than the host needs for the step, so that between the two
        events the device never waits for the host. A step that itself waits for the device gets
        none of that, and is charged for the wait."""
        seconds = min(LONGEST_BACKLOG, 1.5e-6 * (host_us or 0.0) + 5e-4)
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]

    def time(self, step: Step) -> float:
        """Milliseconds between an event before the step and one after it."""
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def rest(self, own_threads: bool) -> None:
        """Nothing: providers share the stream, and each sample has been waited for."""

    def synchronize(self) -> None:
        """Waits for what was launched."""
        torch.cuda.synchronize()

    def host_us(self, step: Step) -> float | None:
        """Microseconds that a step keeps the host, with nothing queued before it: a median."""
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
        """Gives back what the allocator keeps."""
        torch.cuda.empty_cache()


DEVICES: dict[str, Device] = {"cpu": Device(), "cuda": Cuda()}


def _nvidia_smi(field: str) -> str | None:
    """A field of the first GPU; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
