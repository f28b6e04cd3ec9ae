"""The state tensors of a parameter: their keys, shapes, strides and dtypes."""

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
"""The key of a second step counter, saved beside codes in blocks. A partial load that overwrites
the codes does not update it, which shows that codes and counter differ."""


def same_order(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether two strides put the elements of a dense shape in the same memory order."""
    return all(s == t for s, t, n in zip(a, b, shape, strict=True) if n > 1)


@dataclass(frozen=True)
class Layout:
    """Describes a state tensor: its state key, shape, strides and dtype."""

    key: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def fits(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor on this device already has this dtype, shape and element order."""
        return (
            tensor.dtype == self.dtype
            and tensor.device == device
            and tuple(tensor.shape) == self.shape
            and same_order(tensor.stride(), self.stride, self.shape)
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        """A new uninitialised tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class Home(Protocol):
    """The storage location of a parameter's states."""

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        """Whether a tensor has this layout and is stored in this location."""

    def empty(self, layout: Layout) -> torch.Tensor:
        """A new tensor of this layout in this location."""


@dataclass(frozen=True)
class OnDevice:
    """States in a device's own memory; the default location is the parameter's device."""

    device: torch.device

    def fits(self, layout: Layout, tensor: torch.Tensor) -> bool:
        """Whether a tensor has this layout and is on the device."""
        return layout.fits(tensor, self.device)

    def empty(self, layout: Layout) -> torch.Tensor:
        """A new uninitialised tensor of this layout on the device."""
        return layout.empty(self.device)


def state_layouts(param: torch.Tensor, key: str, form: StateFormat) -> list[Layout]:
    """The layouts of a state's codes and, if the format has blocks, of their scales."""
    if form.packed > 1:
        data = Layout(key, (-(-param.numel() // form.packed),), (1,), form.dtype)
    else:
        data = Layout(key, tuple(param.shape), param.stride(), form.dtype)
    if form.scale is None:
        return [data]
    blocks = -(-param.numel() // form.block)
    return [data, Layout(scale_key(key), (blocks,), (1,), form.scale)]


def companion_layout(param: torch.Tensor, form: WeightFormat) -> Layout | None:
    """The layout of a weight's companion; None if the format has no companion."""
    if not form.key:
        return None
    return Layout(form.key, tuple(param.shape), param.stride(), form.companion or param.dtype)


def ema_layout(param: torch.Tensor) -> Layout:
    """The layout of a weight's average."""
    return Layout(EMA, tuple(param.shape), param.stride(), torch.float32)


def held_layouts(param: torch.Tensor, rule: Rule, group: Mapping[str, Any]) -> list[Layout]:
    """The layouts of all state tensors that a group's options need, in allocation order."""
    form, weight = STATE_FORMATS[option(group, "states")], WEIGHT_FORMATS[option(group, "weights")]
    rule = rule.of(group)
    slots = rule.state_slots(rule.flag_bits(group))
    layouts = [
        layout
        for _, key in slots
        for layout in state_layouts(param, key, rule.format_of(key, form))
    ]
    companion = companion_layout(param, weight)
    if companion is not None:
        layouts.append(companion)
    return layouts if option(group, "ema_decay") is None else [*layouts, ema_layout(param)]
