"""The compiled libraries: loading them, and what torch.compile needs to know of their ops."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..rules import LAYOUT

OPS = (
    "sweep_", "make_plan", "refresh", "run", "norm", "free_plan", "judge", "advance", "cpu_isa",
    "layout",
)  # fmt: skip
PACKAGE = Path(__file__).parents[1]
# ONEPASS_CPU_LIBRARY names another build of it, such as that of `make sanitize`.
LIBRARY = Path(os.environ.get("ONEPASS_CPU_LIBRARY") or PACKAGE / "libonepass_cpu.so")
# ONEPASS_CUDA_LIBRARY likewise, such as a variant of `python -m bench.tuning --build`.
CUDA_LIBRARY = Path(os.environ.get("ONEPASS_CUDA_LIBRARY") or PACKAGE / "libonepass_cuda.so")


def _load() -> str:
    """Loads the library; returns why it could not, or an empty string."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} was not built: install a C++ compiler, then "
            "pip install --no-build-isolation onepass"
        )
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    ops = torch.ops.onepass
    if not all(hasattr(ops, name) for name in OPS) or ops.layout() != LAYOUT:
        return f"{LIBRARY.name} is of another version of onepass: build it again"
    return ""


missing: str = _load()
"""Why the compiled library is not there; empty when it is."""


@cache
def cuda_missing() -> str:
    """Why the CUDA library is not there; empty when it is, and then it has been loaded.

    It is loaded when a CUDA device is first asked for: without CUDA nothing is read of it.
    """
    if missing:
        return missing  # the schemas of all ops are in that one
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not CUDA_LIBRARY.exists():
        return (
            f"{CUDA_LIBRARY.name} was not built: with CUDA's nvcc on PATH or CUDA_HOME set, "
            "pip install --no-build-isolation onepass"
        )
    try:
        torch.ops.load_library(CUDA_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{CUDA_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    ops = torch.ops.onepass
    if not hasattr(ops, "cuda_layout") or ops.cuda_layout() != LAYOUT:
        return f"{CUDA_LIBRARY.name} is of another version of onepass: build it again"
    return ""


_cuda_support: dict[int, str] = {}  # by index of a device, where the answer stays the same


def cuda_unsupported(device: int) -> str:
    """Why the CUDA library's kernels cannot run on a GPU; empty when they can.

    Initialises CUDA on that GPU. The answer is kept, except where the reason may pass, such as a
    lack of memory.

    Args:
        device: index of the GPU. :func:`cuda_missing` must have returned an empty string.
    """
    if device not in _cuda_support:
        reason, lasting = torch.ops.onepass.cuda_support(device)
        if not lasting:
            return str(reason)
        _cuda_support[device] = str(reason)
    return _cuda_support[device]


def free_plan(calls: Any, plan: torch.Tensor) -> None:
    """Frees a plan of the compiled libraries, whenever Python comes to it: in the middle of a trace
    by torch.compile, too, whose modes must not see it. calls has the ops of its library."""
    with _disable_current_modes():
        calls.free_plan(plan)


def cpu_isa(name: str = "") -> str:
    """The instruction set of the cpu backend: "avx512", "avx2" or "plain".

    Args:
        name: one of these, or "auto" for the widest that this machine runs, to select it first.
            The environment variable ONEPASS_CPU_ISA does the same when onepass is imported. The
            results do not depend on it.

    Raises:
        RuntimeError: the library is not built, or the machine lacks this instruction set.
    """
    if missing:
        raise RuntimeError(missing)
    return str(torch.ops.onepass.cpu_isa(name))


if not missing:

    @torch.library.register_fake("onepass::sweep_")
    def _sweep_fake(params, grads, states, spec, hyper, counters):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::make_plan")
    def _make_plan_fake(params, states, spec):  # type: ignore[no-untyped-def]
        return (params[0] if params else spec).new_empty(1, dtype=torch.int64)

    @torch.library.register_fake("onepass::refresh")
    def _refresh_fake(plan, params, grads):  # type: ignore[no-untyped-def]
        return 1  # tensors without memory: stale

    @torch.library.register_fake("onepass::run")
    def _run_fake(plan, hyper, counters, telemetry=None, switches=0):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::norm")
    def _norm_fake(plan):  # type: ignore[no-untyped-def]
        return plan.new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("onepass::free_plan")
    def _free_plan_fake(plan):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::judge")
    def _judge_fake(verdict, found, grad_scale, found_inf, max_norm, largest, skip_nonfinite):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::advance")
    def _advance_fake(rule, options, kept, hyper, counters, verdict):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::layout")
    def _layout_fake():  # type: ignore[no-untyped-def]
        return LAYOUT

    @torch.library.register_fake("onepass::cpu_isa")
    def _cpu_isa_fake(name):  # type: ignore[no-untyped-def]
        return name or "auto"

    if os.environ.get("ONEPASS_CPU_ISA"):
        cpu_isa(os.environ["ONEPASS_CPU_ISA"])
