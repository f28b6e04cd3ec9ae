"""The tensors that an optimizer keeps of a parameter: their keys, shapes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, WeightFormat, scale_key
from ..rules import Rule
from ..rules.group_options import option

COMPANIONS = frozenset(form.key for form in WEIGHT_FORMATS.values() if form.key)
STRIDE = "stride"
EMA = "ema"
CODES_STEP = "codes_step"
"""Key of a second step counter, saved beside codes in blocks. A partial load that writes other
values over the codes leaves it behind."""


def same_order(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether strides put the elements of a dense shape in the same order."""
    return all(s == t for s, t, n in zip(a, b, shape, strict=True) if n > 1)


@dataclass(frozen=True)
class Layout:
    """A tensor to be held: its state key, sizes, strides and dtype."""

    key: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def fits(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor can be used as it is."""
        return (
            tensor.dtype == self.dtype
            and tensor.device == device
            and tuple(tensor.shape) == self.shape
            and same_order(tensor.stride(), self.stride, self.shape)
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class Home(Protocol):
    """Where the tensors of a parameter's state rest."""

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        """Whether a tensor can be used as it is."""

    def empty(self, layout: Layout) -> torch.Tensor:
        """A new one."""


@dataclass(frozen=True)
class OnDevice:
    """On a device: the parameter's, unless states are paged."""

    device: torch.device

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        return layout.fits(tensor, self.device)

    def empty(self, layout: Layout) -> torch.Tensor:
        return layout.empty(self.device)


def state_layouts(param: torch.Tensor, key: str, form: StateFormat) -> list[Layout]:
    """The codes of one state and, where the format has them, the scales."""
    if form.packed > 1:
        data = Layout(key, (-(-param.numel() // form.packed),), (1,), form.dtype)
    else:
        data = Layout(key, tuple(param.shape), param.stride(), form.dtype)
    if form.scale is None:
        return [data]
    blocks = -(-param.numel() // form.block)
    return [data, Layout(scale_key(key), (blocks,), (1,), form.scale)]


def companion_layout(param: torch.Tensor, form: WeightFormat) -> Layout | None:
    """The companion of a weight; None where the format has none."""
    if not form.key:
        return None
    return Layout(form.key, tuple(param.shape), param.stride(), form.companion or param.dtype)


def ema_layout(param: torch.Tensor) -> Layout:
    """The average of a weight."""
    return Layout(EMA, tuple(param.shape), param.stride(), torch.float32)


def held_layouts(param: torch.Tensor, rule: Rule, group: Mapping[str, Any]) -> list[Layout]:
    """All tensors that a group's options ask for of a parameter, in the order they are made in."""
    form, weight = STATE_FORMATS[option(group, "states")], WEIGHT_FORMATS[option(group, "weights")]
    slots = rule.state_slots(rule.flag_bits(group))
    layouts = [layout for _, key in slots for layout in state_layouts(param, key, form)]
    companion = companion_layout(param, weight)
    if companion is not None:
        layouts.append(companion)
    return layouts if option(group, "ema_decay") is None else [*layouts, ema_layout(param)]
