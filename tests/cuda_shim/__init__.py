"""Compiles csrc/cuda with g++ against a stand-in for CUDA, as a backend for CPU tensors.

The sources of kernels, plans and launches are unchanged. The ops are registered for CUDA tensors,
so they are called with that dispatch key.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import runpy
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

import onepass
from onepass.engine.backends.cuda import CudaBackend

from ..support.thorough import THOROUGH

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={2 << 56 | 10 << 48}ULL"),
    *("-I", str(HERE), "-isystem", str(TORCH / "include")),
    # All kernels take more than twice as long to compile.
    *([] if THOROUGH else ["-DONEPASS_FEW_KERNELS"]),
    # Macros that select a variant of csrc/cuda/tuning.h, as in setup.py.
    *(f"-D{name}" for name in os.environ.get("ONEPASS_CUDA_DEFINES", "").split()),
]


def why_not() -> str:
    """The reason why the stand-in is unavailable; empty if it is available."""
    if onepass.ops.missing:
        return onepass.ops.missing
    if torch.version.cuda and not onepass.ops.cuda_missing():
        return "the CUDA library itself is loaded, under the same names"
    return "" if shutil.which("g++") else "there is no g++ on PATH"


def _build() -> Path:
    """The path of the library in build/.

    The library is built if a source has changed. The first process that needs it builds it; others
    wait for that process.
    """
    runpy.run_path(str(CSRC / "generate.py"))["write"]()
    sources = [p for p in CSRC.rglob("*.c[up]*") if "cuda" in p.parts]
    sources += HERE.glob("*.cpp")
    sources = sorted(s for s in sources if s.suffix in (".cu", ".cpp"))
    key = hashlib.sha256(repr((FLAGS, torch.__version__)).encode())
    for path in sorted([*CSRC.rglob("*.*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        key.update(path.read_bytes())
    cache_dir = HERE.parents[1] / "build" / "tests"
    cache_dir.mkdir(parents=True, exist_ok=True)
    library = cache_dir / f"cuda_shim-{key.hexdigest()[:20]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    """Compiles the sources, those of a unit as one file, and links the library.

    The files of a unit read torch's headers once and share templates.
    """
    units: dict[str, list[Path]] = {"rules": [], "adam": [], "host": []}  # the longest first
    for source in sources:
        rule = "adam" if source.stem == "sweep_adam" else "rules"
        units[rule if source.stem.startswith("sweep_") else "host"].append(source)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compile_one(unit: str) -> str:
            target = f"{folder}/{unit}.o"
            text = "".join(f'#include "{source}"\n' for source in units[unit])
            command = ["g++", *FLAGS, "-x", "c++", "-c", "-", "-o", target]
            subprocess.run(command, check=True, input=text, text=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units))
        made = f"{folder}/{library.name}"
        link = ["g++", "-shared", *objects, "-o", made, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        subprocess.run(link, check=True)
        os.replace(made, library)


@cache
def _library() -> ctypes.CDLL:
    path = _build()
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def launches() -> int:
    """The number of kernels launched so far."""
    return int(_library().shim_launches())


def blocks() -> int:
    """The number of thread blocks of all launches so far."""
    return int(_library().shim_blocks())


def failed_votes() -> int:
    """The number of rounds of a warp so far that left the fast path."""
    return int(_library().shim_failed_votes())


def set_devices(*devices: tuple[int, int], driver: int = 0) -> None:
    """Replaces the devices of the stand-in and selects the first; the default is one H200.

    Args:
        devices: for each device, its compute capability times 10 and the error that loading a
            kernel on it returns, 0 for none.
        driver: the error that cudaGetDevice and cudaSetDevice return.
    """
    devices = devices or ((90, 0),)
    _library().shim_devices(len(devices), driver)
    for i, (capability, error) in enumerate(devices):
        _library().shim_device(i, capability, error)


def current_device() -> int:
    """The current device of the stand-in."""
    return int(_library().shim_current_device())


def select(device: int = 0, stream: int = 0) -> None:
    """Makes a device and a stream current; stream 0 is the default stream."""
    _library().shim_select(device, ctypes.c_ssize_t(stream))


def fail(call: str, error: int, after: int = 0) -> None:
    """Makes a call of the stand-in return an error once.

    Args:
        call: name of the function: cudaLaunchKernelEx or a function on events.
        error: value of cudaError_t.
        after: number of calls of that function that succeed before the error.
    """
    _library().shim_fail(call.encode(), after, error)


def pending(stream: int) -> int:
    """The number of launches on a stream, including those it waits for, that the host has not
    waited for."""
    return int(_library().shim_pending(ctypes.c_ssize_t(stream)))


def rename_stream(old: int, new: int) -> None:
    """Moves the launches of a stream to another, as if the first stream's handle was reused."""
    _library().shim_rename_stream(ctypes.c_ssize_t(old), ctypes.c_ssize_t(new))


def forget() -> None:
    """Forgets launches on streams, waits, and errors in captures."""
    _library().shim_forget()


def events() -> int:
    """The number of events that have not been destroyed."""
    return int(_library().shim_events())


def last_wait() -> tuple[int, int]:
    """For the last wait of the host, the current device and the device of the event, -1 if none."""
    return int(_library().shim_wait_current()), int(_library().shim_wait_of())


def capture_broken() -> bool:
    """Whether any call would have invalidated a capture."""
    return bool(_library().shim_capture_broken())


def capture_mode() -> int:
    """The capture mode of the thread: 0 (global) unless it was exchanged."""
    return int(_library().shim_mode())


class Capture:
    """A context that records launches for replay() instead of running them. Copies by torch still
    run immediately."""

    number = 0
    active = False

    def __enter__(self) -> Capture:
        Capture.number += 1
        self.active = True
        _library().shim_capture(ctypes.c_ulonglong(Capture.number))
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False
        _library().shim_capture(ctypes.c_ulonglong(0))

    def replay(self) -> None:
        """Runs the launches that the last capture recorded."""
        _library().shim_replay()


class _Calls:
    """torch.ops.onepass with every op dispatched as if its tensors were on a CUDA device."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.onepass, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: op.redispatch(keys, *args)


class ShimBackend(CudaBackend):
    """The cuda backend on CPU tensors."""

    def __init__(self) -> None:
        _library()
        self.calls, self.library = _Calls(), _build()

    def unavailable(self, device: torch.device | None) -> str:
        return "" if device is None or device.type == "cpu" else "it serves CPU tensors only"
