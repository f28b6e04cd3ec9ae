"""The reference backend: :mod:`onepass.reference` over tensors. Slow; it defines the bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .. import reference
from ..formats import NATIVE, STATE_FORMATS
from ..reference import F32, States
from ..rules import SLOTS
from .base import Backend, Entry, same_layout

_FP32, _BF16, _FP16 = (NATIVE[t] for t in (torch.float32, torch.bfloat16, torch.float16))
_BF16_STOCHASTIC = STATE_FORMATS["bf16"].code


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in memory order, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _decode(tensor: torch.Tensor) -> F32:
    flat = _flat(tensor).cpu()
    if tensor.dtype == torch.float32:
        return flat.numpy().copy()
    codes: npt.NDArray[np.uint16] = flat.view(torch.int16).numpy().view(np.uint16)
    decode = reference.decode_bf16 if tensor.dtype == torch.bfloat16 else reference.decode_fp16
    return decode(codes)


def _encode(values: F32, code: int, random: reference.U32 | None) -> torch.Tensor:
    if code == _FP32:
        return torch.from_numpy(values)
    if code == _BF16_STOCHASTIC:
        assert random is not None
        return torch.from_numpy(
            reference.encode_bf16_stochastic(values, random).view(np.int16)
        ).view(torch.bfloat16)
    encode, dtype = {
        _BF16: (reference.encode_bf16, torch.bfloat16),
        _FP16: (reference.encode_fp16, torch.float16),
    }[code]
    return torch.from_numpy(encode(values).view(np.int16)).view(dtype)


class _Prepared:
    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.layouts = [(e.param.shape, e.param.stride(), e.param.dtype) for e in entries]
        self.grads: list[torch.Tensor] = []


class ReferenceBackend(Backend):
    """NumPy on the CPU, whatever the device: it copies there and back."""

    name = "reference"

    def unavailable(self, device: torch.device | None) -> str:
        return ""

    def prepare(self, entries: Sequence[Entry]) -> _Prepared:
        return _Prepared(entries)

    def refresh(self, prepared: _Prepared, grads: list[torch.Tensor], first: int) -> bool:
        prepared.grads = []
        if len(grads) != len(prepared.entries):
            return False
        for entry, layout, grad in zip(prepared.entries, prepared.layouts, grads, strict=True):
            param = entry.param
            if (param.shape, param.stride(), param.dtype) != layout or grad.dtype not in NATIVE:
                return False
            same = all(same_layout(t, param) for t in (grad, *entry.states.values()))
            if not same or grad.device != param.device:
                return False
        prepared.grads = grads
        return True

    def run(self, prepared: _Prepared, hyper: torch.Tensor, counters: torch.Tensor) -> None:
        for entry, grad in zip(prepared.entries, prepared.grads, strict=True):
            with np.errstate(all="ignore"):
                self._run_entry(entry, grad, hyper[entry.row].numpy(), counters[entry.row].tolist())
        prepared.grads = []

    def norm(self, prepared: _Prepared) -> torch.Tensor:
        if len(prepared.grads) != len(prepared.entries):
            raise RuntimeError("onepass: norm without refresh")
        with np.errstate(all="ignore"):
            found = reference.norm(map(_decode, prepared.grads))
        return torch.from_numpy(found).to(prepared.entries[0].param.device)

    def _run_entry(self, entry: Entry, grad: torch.Tensor, row: F32, counters: list[int]) -> None:
        states: States = tuple(
            _decode(entry.states[slot]) if slot in entry.states else None for slot in range(SLOTS)
        )
        rule = entry.rule
        param, states = rule.update(
            _decode(entry.param),
            row[0] * _decode(grad),
            states[: len(rule.slots)],
            list(row[1 : 1 + rule.scalars]),
            rule.flag_names(entry.flags),
        )
        _flat(entry.param).copy_(_encode(param, NATIVE[entry.param.dtype], None))
        seed, step = counters
        for slot, tensor in entry.states.items():
            values = states[slot]
            assert values is not None
            random = None
            if entry.format.stochastic:
                bits = reference.random_bits(
                    seed, step, entry.param_id, entry.first, len(values), slot // 2
                )
                random = bits >> np.uint32(slot % 2 * 16) & np.uint32(0xFFFF)
            _flat(tensor).copy_(_encode(values, entry.format.code, random))
