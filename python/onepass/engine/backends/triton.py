"""The triton backend: one launch of one generic kernel for the whole list (NVIDIA and AMD GPUs).

The kernels are in ``triton_kernels/`` and are imported at the first use of this backend. At import,
Triton decides whether kernels are compiled, or interpreted on CPU tensors (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import chain, repeat
from operator import attrgetter, eq
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...formats import NATIVE
from ...formats.dynamic8 import dynamic_cells, dynamic_map
from ...rules import Rule
from ..hyper_table import RowTable
from ..tensor_access import has_memory
from .base import WORD, Backend, Entry, Policy, StepArgs, same_layout

OLDEST = (3, 6)
# Triton version -> whether ptxas contracts paired fp32 operations (f32x2) to fused multiply-adds.
# Triton pairs operations from compute capability 10.0 on. The values come from the machine code for
# sm_100, which tests/test_triton_compile.py checks.
CONTRACTS: dict[tuple[int, ...], bool] = {
    (3, 6): True,  # 3.6.0, ptxas 12.9: FFMA2 in every kernel that has pairs
    (3, 7): False,  # 3.7.0 and 3.7.1, ptxas 13.1: no FFMA2; FMUL2 and FADD2 for every pair
    (3, 8): False,  # 3.8.0, ptxas 13.3: the same
}
_KERNELS = "onepass.triton_kernels.sweep"
_TABLE = "onepass.triton_kernels.table"
_NORM = "onepass.triton_kernels.norm"
_PROLOGUE = "onepass.triton_kernels.prologue"
_HALF = 1 << 32  # elements: the random keys change here, so no chunk crosses a multiple of it

I64 = npt.NDArray[np.int64]


def _version() -> tuple[int, ...]:
    """Major and minor version of Triton."""
    import triton

    return tuple(int(n) for n in str(triton.__version__).split("+")[0].split(".")[:2])


def _missing() -> str:
    """The reason why Triton cannot be used, or an empty string."""
    install = f"pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    try:
        import triton

        version = _version()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): {install}"
    return "" if version >= OLDEST else f"Triton {triton.__version__} is too old: {install}"


def _contracts(device: torch.device) -> str:
    """The reason why Triton would not return the reference's bits on a GPU, or an empty string.

    A version that is not in :data:`CONTRACTS` is allowed; a test reads its machine code.
    """
    version = _version()
    if not CONTRACTS.get(version, False) or torch.version.hip:
        return ""
    if torch.cuda.get_device_capability(device) < (10, 0):
        return ""
    first = min(known for known, contracts in CONTRACTS.items() if not contracts)
    return (
        f"Triton {version[0]}.{version[1]} merges fp32 multiplications and additions on this GPU, "
        f"which changes results: pip install 'triton=={first[0]}.{first[1]}.*'"
    )


def _interpreted() -> bool:
    """Whether kernels are interpreted; fixed once the kernels are imported."""
    if _KERNELS in sys.modules:
        return bool(sys.modules[_KERNELS].INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _kernels() -> Any:
    """The module with the sweep kernels, imported at the first call."""
    return importlib.import_module(_KERNELS)


def _as_known(read: Callable[[Any], Any], tensors: Iterable[Any], known: Iterable[Any]) -> bool:
    """Whether a property of all tensors equals the known values; builds no list."""
    return all(map(eq, map(read, tensors), known))


def _cuts(numel: int, first: int, chunk: int) -> I64:
    """Start offsets of an entry's chunks, and its end; chunks also end at multiples of 2^32."""
    starts = np.arange(0, numel, chunk, dtype=np.int64)
    boundaries = np.arange(_HALF - first % _HALF, numel, _HALF, dtype=np.int64)
    return np.append(np.union1d(starts, boundaries), numel)


class _Prepared:
    """The entries of one device as GPU tables of chunks and gradients."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.kernels, self.columns = _kernels(), importlib.import_module(_TABLE)
        self.entries = list(entries)
        self.device = entries[0].param.device
        params = [entry.param for entry in entries]
        self.states = [tensor for entry in entries for tensor in entry.written()]
        # Properties that every step compares.
        self.addresses = list(map(torch.Tensor.data_ptr, params + self.states))
        self.dtypes = [tensor.dtype for tensor in params]
        self.shapes = [param.shape for param in params]
        self.strides = [param.stride() for param in params]
        self.sizes = [state.numel() for state in self.states]
        # Values that are set by the first gradients.
        self.grad_dtypes: list[torch.dtype] = []
        self.grad_addresses: I64 = np.zeros(0, np.int64)
        self.variants: Any = None
        self.bound = False
        # Whether a captured step reads self.grads, and other tensors that replays read.
        self.captured = False
        self.kept: list[torch.Tensor] = []

        self.tuning = self.columns.tuning(self.device)
        self.table, self.owners = self._chunk_table()
        self.chunks = torch.from_numpy(self.table.copy()).to(self.device)
        maps = [
            (dynamic_map(signed).view(np.uint32), dynamic_cells(signed)) for signed in (True, False)
        ]
        table = np.stack([np.concatenate(parts) for parts in maps]).view(np.float32)
        self.maps = torch.from_numpy(table).to(self.device)
        self.spans = torch.from_numpy(self._spans()).to(self.device)
        self.grads = torch.zeros(len(entries), dtype=torch.int64, device=self.device)
        self.grad_formats = torch.zeros(len(entries), dtype=torch.int32, device=self.device)

    def _chunk_table(self) -> tuple[I64, I64]:
        """The chunk table without the variant column, and the entry index of each chunk."""
        k = self.columns
        tables, owners = [np.zeros((0, int(k.COLUMNS)), np.int64)], [np.zeros(0, np.int64)]
        for number, entry in enumerate(self.entries):
            cuts = _cuts(entry.param.numel(), entry.first, self.tuning.chunk)
            starts = cuts[:-1]
            table = np.zeros((len(starts), int(k.COLUMNS)), np.int64)
            table[:, k.PARAM] = _addresses(entry.param, starts)
            for slot, state in entry.states.items():
                packed = entry.format_of(slot).packed
                table[:, k.STATES + slot] = _addresses(state, starts, packed)
            for slot, scale in entry.scales.items():
                block = entry.format_of(slot).block
                table[:, k.SCALES + slot] = _addresses(scale, starts, block)
            if entry.companion is not None:
                table[:, k.COMPANION] = _addresses(entry.companion, starts)
            if entry.ema is not None:
                table[:, k.AVERAGE] = _addresses(entry.ema, starts)
            if entry.changed is not None:
                table[:, k.CHANGED] = _addresses(entry.changed, starts, WORD)
            table[:, k.ENTRY] = number
            table[:, k.START] = starts
            table[:, k.COUNT] = np.diff(cuts)
            table[:, k.ROW] = entry.row
            table[:, k.PARAM_ID] = entry.param_id
            table[:, k.INDEX] = entry.first + starts
            tables.append(table)
            owners.append(np.full(len(starts), number))
        return np.concatenate(tables), np.concatenate(owners)

    def _spans(self) -> I64:
        """For each row of the hyperparameter table: its first chunk, and the one after its last."""
        rows = self.table[:, self.columns.ROW]
        spans = np.zeros((1 + max(entry.row for entry in self.entries), 2), np.int64)
        chunks = np.arange(len(rows))
        spans[rows[::-1], 0] = chunks[::-1]
        spans[rows, 1] = chunks + 1
        return spans

    def bind_dtypes(self, grad_dtypes: list[torch.dtype]) -> None:
        """Computes the kernel variants, which depend on the gradients' dtypes."""
        make = self.kernels.Variant
        known: dict[Any, int] = {}
        numbers = np.zeros(len(self.entries), np.int64)
        for i, (entry, dtype) in enumerate(zip(self.entries, grad_dtypes, strict=True)):
            variant = make(
                entry.rule,
                entry.flags,
                entry.weight,
                NATIVE[dtype],
                entry.format_codes,
                entry.ema is not None,
                entry.changed is not None,
            )
            # Empty entries have no chunk and need no compiled variant.
            if entry.param.numel():
                numbers[i] = known.setdefault(variant, len(known))
        # Sort the variants, so that lists in another parameter order share the kernel.
        order = sorted(known)
        places = np.array([order.index(variant) for variant in known], np.int64)
        if len(self.table):
            self.table[:, self.columns.VARIANT] = places[numbers[self.owners]]
            self.chunks.copy_(torch.from_numpy(self.table))
        self.variants = self.kernels.Variants(tuple(order))
        codes = [NATIVE[dtype] for dtype in grad_dtypes]
        self.grad_formats.copy_(torch.tensor(codes, dtype=torch.int32, device="cpu"))
        self.grad_dtypes = grad_dtypes

    def bind_addresses(self, addresses: I64) -> None:
        """Copies the gradients' addresses to the device, asynchronously, if they changed."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if np.array_equal(addresses, self.grad_addresses):
            self.captured |= capturing
            return
        if self.captured or capturing:
            # Replays read the old table: keep it unchanged and use a new one.
            self.kept.append(self.grads)
            self.grads = torch.empty_like(self.grads)
        source = torch.from_numpy(addresses)
        if self.grads.is_cuda:
            # Each copy has its own pinned buffer; torch reuses the buffer after the copy.
            source = source.pin_memory()
        self.grads.copy_(source, non_blocking=True)
        if capturing:
            # Every replay copies the pinned source again: keep it alive.
            self.kept.append(source)
        self.captured = capturing
        self.grad_addresses = np.zeros(0, np.int64) if capturing else addresses


def _addresses(tensor: torch.Tensor, starts: I64, per: int = 1) -> I64:
    """Addresses of the items that store the elements at these offsets, ``per`` elements an item."""
    return tensor.data_ptr() + starts // per * tensor.element_size()


class TritonBackend(Backend):
    """Triton kernels on CUDA and ROCm devices, and on CPU tensors in Triton's interpreter."""

    name = "triton"
    launches = True

    def unavailable(self, device: torch.device | None) -> str:
        """See :meth:`Backend.unavailable`; CPU devices need TRITON_INTERPRET=1."""
        if device is not None and device.type not in ("cpu", "cuda"):
            return "it supports CUDA and ROCm devices only"
        missing = _missing()
        if missing:
            return missing
        interpreted = _interpreted()
        if device is None:
            if interpreted or torch.cuda.is_available():
                return ""
            return "torch finds no GPU, and TRITON_INTERPRET=1 is not set"
        if device.type == "cuda" and interpreted:
            return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors: unset it"
        if device.type == "cuda":
            return _contracts(device)
        if not interpreted:
            return (
                "its kernels are compiled for GPUs; on CPU tensors they run, slowly, when "
                "TRITON_INTERPRET=1 is set before Python starts"
            )
        return ""

    def lacks(self, rule: Rule) -> str:
        """See :meth:`Backend.lacks`; a custom rule needs Triton functions."""
        if rule.options is None or rule.triton_update is not None:
            return ""
        return f"the custom rule {rule.name!r} has no Triton code (Rule.triton_update)"

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        """Builds the tables of the entries; see :meth:`Backend.prepare`.

        Raises:
            ValueError: no kernel exists for the formats of an entry.
        """
        known = _kernels().formats
        for entry in entries:
            code = entry.format.code
            if entry.weight not in known.FORMATS or code not in (
                *known.FORMATS,
                *known.MOMENT_FORMATS,
            ):
                raise ValueError(
                    f"backend 'triton' has no kernel for a parameter of {entry.param.dtype} with "
                    f"states of {entry.format}; backend='reference' supports every format"
                )
            # Two programs would share a word of the record.
            crosses = entry.first % _HALF + entry.param.numel() > _HALF
            if entry.changed is not None and crosses and entry.first % WORD:
                raise ValueError(
                    f"track_changes on backend 'triton' needs a shard that crosses element 2^32 of "
                    f"its parameter to begin at a multiple of {WORD}; parameter {entry.param_id} "
                    f"begins at element {entry.first}"
                )
        return _Prepared(entries)

    def refresh(
        self, prepared: _Prepared, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> bool:
        """See :meth:`Backend.refresh`."""
        p = prepared
        p.bound = False
        if not len(params) == len(grads) == len(p.dtypes):
            return False
        ptr, size, stride = torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride
        same = (
            _as_known(ptr, chain(params, p.states), p.addresses)
            and _as_known(attrgetter("dtype"), params, p.dtypes)
            and _as_known(size, params, p.shapes)
            and _as_known(stride, params, p.strides)
            and not any(map(torch.Tensor.is_neg, grads))
            and _as_known(torch.Tensor.numel, p.states, p.sizes)
            and _as_known(attrgetter("device"), chain(params, grads), repeat(p.device))
            and _as_known(attrgetter("layout"), grads, repeat(torch.strided))
        )
        if not same:
            return False
        grad_dtypes = [grad.dtype for grad in grads]
        if grad_dtypes != p.grad_dtypes and not NATIVE.keys() >= set(grad_dtypes):
            return False
        # Strides of size-1 dimensions may differ: compare layouts only if shapes or strides differ.
        alike = _as_known(size, grads, p.shapes) and _as_known(stride, grads, p.strides)
        if not alike and not all(map(same_layout, grads, params)):
            return False
        addresses = np.fromiter(map(ptr, grads), np.int64, len(grads))
        # Freeing or shrinking a storage usually changes its address: skip gradients that were
        # checked at the same addresses in the step before.
        if not np.array_equal(addresses, p.grad_addresses) and not all(map(has_memory, grads)):
            return False
        with _on(p.device):
            if grad_dtypes != p.grad_dtypes:
                p.bind_dtypes(grad_dtypes)
            p.bind_addresses(addresses)
        p.bound = True
        return True

    def run(self, prepared: _Prepared, step: StepArgs) -> None:
        """See :meth:`Backend.run`.

        Raises:
            RuntimeError: :meth:`refresh` was not called for this step.
        """
        p = prepared
        # Addresses are valid for one step, because a gradient may be freed afterwards.
        if not p.bound:
            raise RuntimeError("onepass: run without refresh")
        p.bound = False
        if not len(p.table):
            if step.telemetry is not None:
                step.telemetry.zero_()
            return
        with _on(p.device):
            p.kernels.launch(p.chunks, p.grads, p.maps, p.variants, p.tuning, p.spans, step)

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        """Measures the gradients in two launches; see :meth:`Backend.norm`.

        The relative error of the sum of squares is at most 9 * 2^-24: groups of eight squares are
        rounded and added in fp32, the rest in float64. The result depends on the sizes of the
        tensors but not on the GPU.

        Raises:
            RuntimeError: :meth:`refresh` was not called for this step.
        """
        p = prepared
        if not p.bound:
            raise RuntimeError("onepass: norm without refresh")
        with _on(p.device):
            found: torch.Tensor = importlib.import_module(_NORM).launch(
                p.chunks, p.grads, p.grad_formats
            )
        return found

    def judge(
        self,
        verdict: torch.Tensor,
        found: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        policy: Policy,
    ) -> None:
        """Computes the verdict in a kernel; see :meth:`Backend.judge`."""
        with _on(verdict.device):
            importlib.import_module(_PROLOGUE).launch_judge(
                verdict, found, grad_scale, found_inf, policy.max_norm, policy.largest,
                policy.skip_nonfinite,
            )  # fmt: skip

    def stage(self, table: RowTable, verdict: torch.Tensor | None) -> None:
        """Does nothing: the kernel of :meth:`advance` reads the counters on the device."""
        return None

    def advance(self, table: RowTable, verdict: torch.Tensor | None, staged: None) -> None:
        """Uploads changed options and runs a kernel; see :meth:`Backend.advance`."""
        with _on(table.steps.device):
            table.upload()
            importlib.import_module(_PROLOGUE).launch_advance(
                table.rule, table.options, table.kept, table.hyper, table.counters, verdict,
            )  # fmt: skip

    def count(self, table: RowTable, staged: None) -> None:
        """Does nothing: the kernel of :meth:`advance` has advanced the counters."""


def _on(device: torch.device) -> Any:
    """A context that makes a GPU the current device, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
