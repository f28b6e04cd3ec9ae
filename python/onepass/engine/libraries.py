"""Loads the compiled libraries and registers fake implementations of their ops."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..rules import LAYOUT

OPS = (
    "sweep_", "make_plan", "refresh", "run", "norm", "free_plan", "take_changes", "judge",
    "advance", "cpu_isa", "layout",
)  # fmt: skip
PACKAGE = Path(__file__).parents[1]
# ONEPASS_CPU_LIBRARY names another build of the CPU library, such as that of `make sanitize`.
LIBRARY = Path(os.environ.get("ONEPASS_CPU_LIBRARY") or PACKAGE / "libonepass_cpu.so")
# ONEPASS_CUDA_LIBRARY names another build of the CUDA library, such as a variant of
# `python -m bench.tuning --build`.
CUDA_LIBRARY = Path(os.environ.get("ONEPASS_CUDA_LIBRARY") or PACKAGE / "libonepass_cuda.so")


def _other_layout(library: Path, layout: str) -> str:
    """The reason to refuse a library whose rules or limits differ from those in Python."""
    return (
        f"{library.name} was built for other rules or limits ({layout}) than this onepass has "
        f"({LAYOUT}): build it again; a rule needs csrc/rules/<name>.h too"
    )


def _load() -> str:
    """Loads the CPU library; returns the reason if that fails, else an empty string."""
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
    if not all(hasattr(ops, name) for name in OPS):
        return f"{LIBRARY.name} is of another version of onepass: build it again"
    if ops.layout() != LAYOUT:
        return _other_layout(LIBRARY, ops.layout())
    return ""


missing: str = _load()
"""The reason why the CPU library is unavailable; empty if it is loaded."""


@cache
def cuda_missing() -> str:
    """The reason why the CUDA library is unavailable; empty if the library is loaded.

    The library is loaded at the first request for a CUDA device. A process without CUDA never reads
    the file.
    """
    if missing:
        return missing  # the CPU library defines the schemas of all ops
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
    if not hasattr(ops, "cuda_refusal"):
        return f"{CUDA_LIBRARY.name} is of another version of onepass: build it again"
    if ops.cuda_layout() != LAYOUT:
        return _other_layout(CUDA_LIBRARY, ops.cuda_layout())
    if refusal := ops.cuda_refusal():
        return f"{CUDA_LIBRARY.name} {refusal}"
    return ""


_cuda_support: dict[int, str] = {}  # device index -> permanent answers of cuda_unsupported


def cuda_unsupported(device: int) -> str:
    """The reason why the CUDA library's kernels cannot run on a GPU; empty if they can.

    Initialises CUDA on that GPU. The answer is cached unless the reason is temporary, such as too
    little free memory.

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
    """Frees a plan of a compiled library.

    Python may run this finalizer during a torch.compile trace. The trace's dispatch modes are
    disabled so that they do not record the call.

    Args:
        calls: the namespace with the ops of the library.
        plan: the handle that ``make_plan`` returned.
    """
    with _disable_current_modes():
        calls.free_plan(plan)


def cpu_isa(name: str = "") -> str:
    """The instruction set of the cpu backend: "avx512", "avx2" or "plain".

    Args:
        name: the instruction set to select before the query, or "auto" for the widest one that this
            machine supports; empty selects nothing. The environment variable ONEPASS_CPU_ISA
            selects one when onepass is imported. Results do not depend on the instruction set.

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
        return 1  # stale: fake tensors have no memory

    @torch.library.register_fake("onepass::run")
    def _run_fake(plan, hyper, counters, telemetry=None, switches=0):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::norm")
    def _norm_fake(plan):  # type: ignore[no-untyped-def]
        return plan.new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("onepass::free_plan")
    def _free_plan_fake(plan):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("onepass::take_changes")
    def _take_changes_fake(records, params, wide):  # type: ignore[no-untyped-def]
        # The number of changes depends on the data.
        total = torch.library.get_ctx().new_dynamic_size()
        counts = records[0].new_empty(len(params), dtype=torch.int64)
        positions = records[0].new_empty(total, dtype=torch.int64 if wide else torch.int32)
        return counts, positions, params[0].new_empty(total)

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
