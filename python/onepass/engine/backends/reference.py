"""The reference backend: the specification in NumPy (:mod:`onepass.rules`, :mod:`onepass.formats`).

It is slow and defines the exact result bits of all backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...formats import NATIVE, WEIGHT_FORMAT_OF_CODE, WEIGHT_FORMATS, WeightFormat
from ...numerics.arrays import F32, U32
from ...numerics.gradient_norm import norm as gradient_norm
from ...numerics.random_bits import STATE_BITS, bits_from, random_bits
from ...rules import EMA
from .. import numpy_codec
from ..hyper_table import TELEMETRY_WIDTH
from ..tensor_access import has_memory
from .base import WORD, Backend, Entry, StepArgs, same_layout

F64 = npt.NDArray[np.float64]
_NATIVE = WEIGHT_FORMATS["native"]
TILE = 1 << 16
"""Elements that are computed at once: a multiple of every block size, whose arrays fit a cache."""


def _layouts(entry: Entry) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    """Shape, strides and dtype of the parameter and its state tensors."""
    return [(t.shape, t.stride(), t.dtype) for t in (entry.param, *entry.written())]


class _Prepared:
    """The entries with the layouts and devices that :meth:`ReferenceBackend.refresh` compares."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.layouts = [_layouts(entry) for entry in entries]
        self.devices = [entry.param.device for entry in entries]
        self.grads: list[torch.Tensor] = []


class ReferenceBackend(Backend):
    """Runs NumPy on the CPU for any device; tensors are copied to the CPU and back."""

    name = "reference"

    def unavailable(self, device: torch.device | None) -> str:
        """An empty string: this backend serves every device."""
        return ""

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        """See :meth:`Backend.prepare`."""
        return _Prepared(entries)

    def refresh(
        self, prepared: _Prepared, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> bool:
        """See :meth:`Backend.refresh`."""
        prepared.grads = []
        entries = prepared.entries
        if not len(params) == len(grads) == len(entries):
            return False
        for entry, layouts, device, param, grad in zip(
            entries, prepared.layouts, prepared.devices, params, grads, strict=True
        ):
            if param.device != device or grad.device != device:
                return False
            if _layouts(entry) != layouts or grad.dtype not in NATIVE:
                return False
            if not all(map(has_memory, (*entry.written(), entry.param, grad))):
                return False
            if param.data_ptr() != entry.param.data_ptr() or not same_layout(param, entry.param):
                return False
            if not same_layout(grad, entry.param):
                return False
        prepared.grads = grads
        return True

    def run(self, prepared: _Prepared, step: StepArgs) -> None:
        """See :meth:`Backend.run`."""
        hyper, counters = step.hyper, step.counters
        sums = np.zeros((len(hyper), TELEMETRY_WIDTH))
        for entry, grad in zip(prepared.entries, prepared.grads, strict=True):
            row, keys = hyper[entry.row].cpu().numpy(), counters[entry.row].tolist()
            with np.errstate(all="ignore"):
                for tile, tile_grad in _tiles(entry, grad):
                    sums[entry.row] += self._run_entry(tile, tile_grad, row, keys)
            if step.switches.zero_grads:
                grad.zero_()
        if step.telemetry is not None:
            step.telemetry.copy_(torch.from_numpy(sums))
        prepared.grads = []

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        """See :meth:`Backend.norm`.

        Raises:
            RuntimeError: :meth:`refresh` was not called.
        """
        if len(prepared.grads) != len(prepared.entries):
            raise RuntimeError("onepass: norm without refresh")
        with np.errstate(all="ignore"):
            grads = (numpy_codec.read_weight(_NATIVE, grad) for grad in prepared.grads)
            found = gradient_norm(grads)
        return torch.from_numpy(found).to(prepared.entries[0].param.device)

    def _run_entry(self, entry: Entry, grad: torch.Tensor, row: F32, counters: list[int]) -> F64:
        """Runs the step of one entry; returns its telemetry."""
        rule, kinds, count = entry.rule, entry.rule.kinds, entry.param.numel()
        weight = WEIGHT_FORMAT_OF_CODE[entry.weight]
        before = numpy_codec.read_weight(weight, entry.param, entry.companion)
        raw = numpy_codec.read_weight(_NATIVE, grad)
        seed, step = counters
        if step == 0:
            return _telemetry(raw, before, before)
        states = numpy_codec.read_states(entry.format, kinds, entry.states, entry.scales, count)
        param, states = rule.update(
            before, row[0] * raw, states, list(row[1 : 1 + rule.scalars]),
            rule.flag_names(entry.flags),
        )  # fmt: skip
        dither, *random = _random_uses(entry, weight, seed, step)
        codes = None if entry.changed is None else numpy_codec.to_array(entry.param)
        numpy_codec.write_weight(weight, param, entry.param, entry.companion, dither)
        if entry.changed is not None and codes is not None:
            _record(entry.changed, codes, numpy_codec.to_array(entry.param))
        numpy_codec.write_states(entry.format, kinds, states, entry.states, entry.scales, random)
        if entry.ema is not None:
            # The average uses the computed fp32 weight, before it is rounded to the weight format.
            numpy_codec.write(
                entry.ema, row[EMA] * numpy_codec.to_array(entry.ema) + row[EMA + 1] * param
            )
        return _telemetry(raw, before, param)


def _random_uses(entry: Entry, weight: WeightFormat, seed: int, step: int) -> list[U32 | None]:
    """The random bits of the weight, and of the state of each slot; None for what draws none."""
    drawn = [
        i in entry.states and entry.format_of(i).stochastic for i in range(len(entry.rule.kinds))
    ]
    of_weight = weight.position_of_bits(any(drawn)) if weight.stochastic else None
    of_states = [STATE_BITS[i] if draws else None for i, draws in enumerate(drawn)]
    positions = [of_weight, *of_states]
    where = (seed, step, entry.param_id, entry.first, entry.param.numel())
    words = {w: random_bits(*where, w) for w in {p // 32 for p in positions if p is not None}}
    return [None if p is None else bits_from(words, p) for p in positions]


def _tiles(entry: Entry, grad: torch.Tensor) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Divides an entry into entries of at most TILE elements, which are views of its memory."""
    count = entry.param.numel()
    # As with kernels, only the plan increments the version of a parameter.
    entry = replace(entry, param=entry.param.data)
    if count <= TILE:
        yield entry, grad
        return
    for begin in range(0, count, TILE):
        end = min(begin + TILE, count)

        def part(tensor: torch.Tensor, per: int = 1) -> torch.Tensor:
            return numpy_codec.flat(tensor)[begin // per : -(-end // per)]  # noqa: B023

        tile = replace(
            entry,
            param=part(entry.param),
            states={i: part(state, entry.format_of(i).packed) for i, state in entry.states.items()},
            scales={i: part(scale, entry.format_of(i).block) for i, scale in entry.scales.items()},
            companion=None if entry.companion is None else part(entry.companion),
            ema=None if entry.ema is None else part(entry.ema),
            changed=None if entry.changed is None else part(entry.changed, WORD),
            first=entry.first + begin,
        )
        yield tile, part(grad)


def _record(changed: torch.Tensor, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> None:
    """Sets the bits of the elements whose codes differ; see :class:`Entry`."""
    integers = np.dtype(f"u{before.itemsize}")
    bits = np.zeros(len(changed) * WORD, np.uint8)
    bits[: len(before)] = before.view(integers) != after.view(integers)
    words = np.packbits(bits, bitorder="little").view(np.dtype("<i4")).astype(np.int32)
    changed |= torch.from_numpy(words).to(changed.device)


def _telemetry(grad: F32, before: F32, after: F32) -> F64:
    """float64 sums of squares of the gradient, the new weight and the fp32 update, and the number
    of non-finite gradients."""
    wide = (array.astype(np.float64) for array in (grad, after, after - before))
    return np.array([*(np.sum(w * w) for w in wide), np.count_nonzero(~np.isfinite(grad))])
