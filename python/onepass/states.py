"""What an optimizer holds of a parameter: layouts of the tensors, new ones, and conversions.

``optimizer.state[param]`` has, for each state of the rule, its codes under torch.optim's key and,
in formats with blocks, their scales under ``<key>_scale``; the companion of the weight under the
key of its format; and ``step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import codec
from .backends.base import same_layout
from .checks import is_dense
from .formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, WeightFormat, scale_key
from .rules import Rule

COMPANIONS = frozenset(form.key for form in WEIGHT_FORMATS.values() if form.key)


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

    def fits(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor can be used as it is."""
        return (
            tensor.dtype == self.dtype
            and tensor.device == device
            and tuple(tensor.shape) == self.shape
            and all(
                s == t
                for s, t, n in zip(tensor.stride(), self.stride, self.shape, strict=True)
                if n > 1
            )
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


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


def fill(held: Mapping[str, torch.Tensor], key: str, form: StateFormat, value: float) -> None:
    """Sets a state, all zero bytes until now, to a value above zero."""
    if form.scale is None:
        held[key].fill_(value)
        return
    # Every block is the same.
    values = np.full(form.block, value, np.float32)
    data = torch.empty(form.block // form.packed, dtype=form.dtype)
    scale = torch.empty(1, dtype=form.scale)
    codec.write_states(form, ["second"], (values,), {0: data}, {0: scale})
    held[key].fill_(data[0].item())
    held[scale_key(key)].fill_(scale[0].item())


def stale_keys(state: Mapping[str, Any], held: Mapping[str, Any], rule: Rule) -> list[str]:
    """Keys of scales and companions that are not held any more."""
    kept = COMPANIONS | {scale_key(key) for key, _, _ in rule.slots}
    return [key for key in state if key in kept and key not in held]


def _tensor(value: Any, which: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{which} is {type(value).__name__}: it is the state of another parameter")
    return value


def _format_of(
    data: torch.Tensor, scale: torch.Tensor | None, param: torch.Tensor, saved_as: str
) -> StateFormat:
    """The format that a saved state is in, by its tensors."""
    if scale is None:
        return STATE_FORMATS["bf16" if data.dtype == torch.bfloat16 else "fp32"]
    if scale.dtype == torch.float32:
        return STATE_FORMATS["dynamic8"]
    if saved_as in ("mx8", "mx4") and param.shape == (1,):
        return STATE_FORMATS[saved_as]  # both have one code then
    return STATE_FORMATS["mx8" if data.shape == param.shape else "mx4"]


def fit_states(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    rule: Rule,
    form: StateFormat,
    which: str,
    copy: bool = False,
    saved_as: str = "",
) -> dict[str, torch.Tensor]:
    """The states that ``saved`` has of a parameter, in a format, its layout and on its device.

    Tensors that are so already are returned themselves unless copy is set; a conversion rounds to
    nearest.

    Raises:
        ValueError: one is no tensor of the parameter's size; names it.
    """
    slots = [(i, key) for i, (key, _, _) in enumerate(rule.slots) if saved.get(key) is not None]
    if not slots:
        return {}
    found: dict[str, torch.Tensor] = {}
    forms = set()
    for _, key in slots:
        data = _tensor(saved[key], f"{key} of {which}")
        scale = saved.get(scale_key(key))
        source = _format_of(data, scale, param, saved_as or form.name)
        wanted = state_layouts(param, key, source)
        for layout, value in zip(wanted, [data] if scale is None else [data, scale], strict=True):
            if tuple(value.shape) != layout.shape:
                raise ValueError(
                    f"{layout.key} of {which} is {tuple(value.shape)}: it is the state of another "
                    "parameter"
                )
            found[layout.key] = value if is_dense(value) else value.contiguous()
        forms.add(source.name)
    if len(forms) > 1 and not forms <= {"fp32", "bf16"}:
        raise ValueError(f"the states of {which} are in different formats: {sorted(forms)}")
    if len(forms) > 1:
        found, forms = {key: value.float() for key, value in found.items()}, {"fp32"}
    source = STATE_FORMATS[forms.pop()]

    layouts = [layout for _, key in slots for layout in state_layouts(param, key, form)]
    new = {layout.key: layout for layout in layouts}
    if source is form and all(x.fits(found[x.key], param.device) for x in layouts):
        return {key: value.clone() if copy else value for key, value in found.items()}
    held = {layout.key: layout.empty(param.device) for layout in layouts}
    if (source is form and source.block == 1) or (source.scale is None and form.scale is None):
        for key in new:
            held[key].copy_(found[key])
        return held
    _convert(found, source, held, form, param, rule, slots)
    return held


def _convert(
    found: Mapping[str, torch.Tensor],
    source: StateFormat,
    held: Mapping[str, torch.Tensor],
    form: StateFormat,
    param: torch.Tensor,
    rule: Rule,
    slots: list[tuple[int, str]],
) -> None:
    """Decodes every state and encodes it again, in the parameter's order in memory."""
    scaled = [(i, key) for i, key in slots if source.scale is not None]
    values = codec.read_states(
        source,
        rule.kinds,
        {i: found[key] for i, key in slots},
        {i: found[scale_key(key)] for i, key in scaled},
        param.numel(),
    )
    ordered: list[Any] = [None] * len(values)
    for i, key in slots:
        value = values[i]
        assert value is not None
        if source.packed == 1 and not same_layout(found[key], param):
            logical = torch.empty(param.numel()).as_strided(param.shape, found[key].stride())
            codec.flat(logical).copy_(torch.from_numpy(value))
            moved = torch.empty_strided(param.shape, param.stride()).copy_(logical)
            value = codec.flat(moved).numpy()
        ordered[i] = value
    codec.write_states(
        form,
        rule.kinds,
        tuple(ordered),
        {i: held[key] for i, key in slots},
        {i: held[scale_key(key)] for i, key in slots if form.scale is not None},
    )


def fit_companion(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    form: WeightFormat,
    which: str,
    copy: bool = False,
) -> torch.Tensor | None:
    """The companion that ``saved`` has of a weight, in a format; None where none is wanted.

    A new one says that the weight is exactly what it shows. A companion of another format is
    converted, given the weight as it is now.

    Raises:
        ValueError: a companion of another size.
    """
    layout = companion_layout(param, form)
    if layout is None:
        return None
    key = next((key for key in sorted(COMPANIONS) if saved.get(key) is not None), None)
    if key is None:
        companion = layout.empty(param.device)
        return companion.copy_(param.detach()) if form.name == "master" else companion.zero_()
    value = _tensor(saved[key], f"{key} of {which}")
    if tuple(value.shape) != layout.shape:
        raise ValueError(
            f"{key} of {which} is {tuple(value.shape)}: it is the state of another parameter"
        )
    if key == form.key and value.dtype == layout.dtype:
        if layout.fits(value, param.device) and not copy:
            return value
        return layout.empty(param.device).copy_(value)
    full = full_precision(param, {key: value})
    weight, companion = torch.empty_like(param.detach()), layout.empty(param.device)
    codec.write_weight(form.codes[param.dtype], codec.to_array(full), weight, companion)
    return companion


def full_precision(param: torch.Tensor, saved: Mapping[str, Any]) -> torch.Tensor:
    """A weight as the fp32 value that it and the companion in its state stand for."""
    for form in WEIGHT_FORMATS.values():
        value = saved.get(form.key) if form.key else None
        if value is None or param.dtype not in form.codes:
            continue
        if value.dtype != (form.companion or param.dtype):
            continue
        companion = torch.empty_like(param.detach(), dtype=value.dtype).copy_(value)
        values = codec.read_weight(form.codes[param.dtype], param, companion)
        full = torch.empty_like(param.detach(), dtype=torch.float32)
        codec.flat(full).copy_(torch.from_numpy(values))
        return full
    return param.detach().float()
