"""What an optimizer holds of a parameter: new tensors, and conversions of saved ones.

``optimizer.state[param]`` has, for each state of the rule, its codes under torch.optim's key and,
in formats with blocks, their scales under ``<key>_scale``; the companion of the weight under the
key of its format; the average of the weight under ``ema``; and ``step``. Packed codes do not show
the order in which they lie: where that of the parameter is not the contiguous one, its strides are
there as ``stride``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..formats import STATE_FORMATS, WEIGHT_FORMATS, StateFormat, WeightFormat, scale_key
from ..rules import Rule
from . import numpy_codec
from .state_layouts import (
    CODES_STEP,
    COMPANIONS,
    EMA,
    STRIDE,
    Home,
    OnDevice,
    companion_layout,
    ema_layout,
    same_order,
    state_layouts,
)
from .validation import check_memory, is_dense


def fill(held: Mapping[str, torch.Tensor], key: str, form: StateFormat, value: float) -> None:
    """Sets a state, all zero bytes until now, to a value above zero."""
    if form.scale is None:
        held[key].fill_(value)
        return
    # Every block is the same.
    values = np.full(form.block, value, np.float32)
    data = torch.empty(form.block // form.packed, dtype=form.dtype, device="cpu")
    scale = torch.empty(1, dtype=form.scale, device="cpu")
    numpy_codec.write_states(form, ["second"], (values,), {0: data}, {0: scale})
    held[key].fill_(data[0].item())
    held[scale_key(key)].fill_(scale[0].item())


def packed_order(param: torch.Tensor, form: StateFormat) -> dict[str, tuple[int, ...]]:
    """What a parameter's state says of the order of its packed codes; nothing where it is the
    contiguous one."""
    if form.packed == 1 or param.is_contiguous():
        return {}
    return {STRIDE: param.stride()}


def stale_keys(state: Mapping[str, Any], held: Mapping[str, Any], rule: Rule) -> list[str]:
    """Keys of scales, companions, averages, orders and counters that are not held any more."""
    kept = COMPANIONS | {STRIDE, EMA, CODES_STEP} | set(map(scale_key, rule.keys))
    return [key for key in state if key in kept and key not in held]


def _tensor(value: Any, which: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{which} is {type(value).__name__}: it is the state of another parameter")
    check_memory(value, which)
    return value


def format_of(data: torch.Tensor, scale: torch.Tensor | None, which: str) -> StateFormat:
    """The format that a state is in, by the dtypes of its tensors.

    Raises:
        ValueError: no format has these; names the state.
    """
    if (scale is None) != data.is_floating_point():
        raise ValueError(
            f"{which} is {data.dtype} {'without' if scale is None else 'with'} a scale: codes have "
            "one, numbers have none"
        )
    scales = None if scale is None else scale.dtype
    for form in STATE_FORMATS.values():
        if (form.dtype, form.scale) == (data.dtype, scales):
            return form
    if scale is None:
        return STATE_FORMATS["fp32"]  # torch.optim's states of an fp16 weight are fp16
    raise ValueError(f"{which} is {data.dtype} with {scales} scales: no format has these")


def fit_states(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    rule: Rule,
    form: StateFormat,
    which: str,
    copy: bool = False,
    home: Home | None = None,
) -> dict[str, torch.Tensor]:
    """The states that ``saved`` has of a parameter, in a format, its layout and where they rest:
    at home, or None for the parameter's device.

    Tensors that are so already are returned themselves unless copy is set; a conversion rounds to
    nearest.

    Raises:
        ValueError: one is no tensor of the parameter's size; names it.
    """
    slots = [(i, key) for i, key in enumerate(rule.keys) if saved.get(key) is not None]
    if not slots:
        return {}
    home = home or OnDevice(param.device)
    found, source = _checked_states(saved, param, slots, which)
    strides = {key: found[key].stride() for _, key in slots}
    if source.packed > 1:
        strides = dict.fromkeys(strides, _saved_stride(saved, param, which))

    layouts = [layout for _, key in slots for layout in state_layouts(param, key, form)]
    new = {layout.key: layout for layout in layouts}
    in_order = all(same_order(strides[key], param.stride(), param.shape) for key in strides)
    fits = source is form and in_order and not copy
    if fits and all(home.fits(layout, found[layout.key]) for layout in layouts):
        return found
    held = {layout.key: home.empty(layout) for layout in layouts}
    plain = source.scale is None and form.scale is None
    if plain or (source is form and (source.block == 1 or in_order)):
        for key in new:
            held[key].copy_(found[key])
        return held
    _convert(found, source, strides, held, form, param, rule, slots)
    return held


def _checked_states(
    saved: Mapping[str, Any], param: torch.Tensor, slots: list[tuple[int, str]], which: str
) -> tuple[dict[str, torch.Tensor], StateFormat]:
    """The dense states and scales that ``saved`` has in these slots, and their format.

    Raises:
        ValueError: one is no tensor of the parameter's size, or their formats differ.
    """
    found: dict[str, torch.Tensor] = {}
    forms = set()
    for _, key in slots:
        data = _tensor(saved[key], f"{key} of {which}")
        scale = saved.get(scale_key(key))
        if scale is not None:
            scale = _tensor(scale, f"{scale_key(key)} of {which}")
        if scale is not None and scale.dim() == 0:
            scale = None  # of values that were saved in place of codes
        source = format_of(data, scale, f"{key} of {which}")
        wanted = state_layouts(param, key, source)
        for layout, value in zip(wanted, [data] if scale is None else [data, scale], strict=True):
            if len(layout.shape) == 1 and value.numel() == layout.numel:
                value = value.reshape(-1)  # of a DTensor, whose scales have the shape of its rows
            if tuple(value.shape) != layout.shape:
                raise ValueError(
                    f"{layout.key} of {which} is {tuple(value.shape)}: it is the state of another "
                    "parameter"
                )
            found[layout.key] = value if is_dense(value) else value.contiguous()
        if source.scale is None:
            found[key] = found[key].to(source.dtype)
        forms.add(source.name)
    if len(forms) > 1 and any(STATE_FORMATS[name].scale is not None for name in forms):
        raise ValueError(f"the states of {which} are in different formats: {sorted(forms)}")
    if len(forms) > 1:
        found, forms = {key: value.float() for key, value in found.items()}, {"fp32"}
    return found, STATE_FORMATS[forms.pop()]


def _saved_stride(saved: Mapping[str, Any], param: torch.Tensor, which: str) -> tuple[int, ...]:
    """The order in which packed codes lie, as strides of the parameter's shape."""
    stride = saved.get(STRIDE)
    if stride is None:
        return torch.empty(param.shape, device="meta").stride()
    stride = tuple(stride)
    if len(stride) != param.dim() or not is_dense(
        torch.empty_strided(param.shape, stride, device="meta")
    ):
        raise ValueError(f"{STRIDE} of {which} is {stride}: it is the state of another parameter")
    return stride


def _convert(
    found: Mapping[str, torch.Tensor],
    source: StateFormat,
    strides: Mapping[str, tuple[int, ...]],
    held: Mapping[str, torch.Tensor],
    form: StateFormat,
    param: torch.Tensor,
    rule: Rule,
    slots: list[tuple[int, str]],
) -> None:
    """Decodes every state and encodes it again, in the parameter's order in memory."""
    scaled = [(i, key) for i, key in slots if source.scale is not None]
    values = numpy_codec.read_states(
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
        if not same_order(strides[key], param.stride(), param.shape):
            logical = torch.empty_strided(
                param.shape, strides[key], dtype=torch.float32, device="cpu"
            )
            numpy_codec.flat(logical).copy_(torch.from_numpy(value))
            moved = torch.empty_strided(
                param.shape, param.stride(), dtype=torch.float32, device="cpu"
            ).copy_(logical)
            value = numpy_codec.flat(moved).numpy()
        ordered[i] = value
    numpy_codec.write_states(
        form,
        rule.kinds,
        tuple(ordered),
        {i: held[key] for i, key in slots},
        {i: held[scale_key(key)] for i, key in slots if form.scale is not None},
    )


def to_bytes(companion: torch.Tensor) -> torch.Tensor:
    """A companion of int16 as uint8 [*shape, 2], on the same memory; any other companion itself.

    State dicts and DTensors hold it so, because process groups do not send int16.
    """
    if companion.dtype != torch.int16:
        return companion
    return companion.unsqueeze(-1).view(torch.uint8)


def from_bytes(companion: torch.Tensor) -> torch.Tensor:
    """What :func:`to_bytes` was given; any other companion itself."""
    if companion.dtype != torch.uint8:
        return companion
    return companion.view(torch.int16).squeeze(-1)


def fit_companion(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    form: WeightFormat,
    which: str,
    copy: bool = False,
    home: Home | None = None,
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
    home = home or OnDevice(param.device)
    key = next((key for key in sorted(COMPANIONS) if saved.get(key) is not None), None)
    if key is None:
        companion = home.empty(layout)
        return companion.copy_(param.detach()) if form.starts_as_weight else companion.zero_()
    value = _tensor(saved[key], f"{key} of {which}")
    if value.dtype == torch.uint8 and tuple(value.shape) == (*layout.shape, 2):
        value = from_bytes(value)
    if tuple(value.shape) != layout.shape:
        raise ValueError(
            f"{key} of {which} is {tuple(value.shape)}: it is the state of another parameter"
        )
    if key == form.key and value.dtype == layout.dtype:
        if home.fits(layout, value) and not copy:
            return value
        return home.empty(layout).copy_(value)
    values = numpy_codec.to_array(full_precision(param, {key: value}))
    companion = home.empty(layout)
    weight = torch.empty_like(param.detach())
    numpy_codec.write_weight(form, values, weight, companion)
    # The weight stays what it is, but near the middle between two weights formats round
    # differently: such a value moves towards the weight, by as little as the format can tell. What
    # is farther away was left over of another weight, changed since.
    bits, kept = values.view(np.uint32), numpy_codec.to_array(param)
    for ulps in (1, 256, None):
        found = numpy_codec.to_array(weight)
        off = found != kept
        if not off.any():
            break
        if ulps is None:
            values[off] = numpy_codec.read_weight(WEIGHT_FORMATS["native"], param)[off]
        else:
            outwards = (kept & 0x7FFF) > (found & 0x7FFF)
            bits[off] += np.where(outwards, np.uint32(ulps), np.uint32(2**32 - ulps))[off]
        numpy_codec.write_weight(form, values, weight, companion)
    return companion


def fit_ema(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    which: str,
    copy: bool = False,
    home: Home | None = None,
) -> torch.Tensor:
    """The average that ``saved`` has of a weight, fp32; a new one is the weight as it is.

    Raises:
        ValueError: it is no tensor of the parameter's size; names it.
    """
    layout = ema_layout(param)
    home = home or OnDevice(param.device)
    if saved.get(EMA) is None:
        # Of a weight alone the copy converts: no fp32 tensor on the way, as large as the average.
        alone = not any(saved.get(key) is not None for key in COMPANIONS)
        weight = param.detach() if alone else full_precision(param, saved)
        return home.empty(layout).copy_(weight)
    value = _tensor(saved[EMA], f"{EMA} of {which}")
    if tuple(value.shape) != layout.shape:
        raise ValueError(
            f"{EMA} of {which} is {tuple(value.shape)}: it is the state of another parameter"
        )
    if home.fits(layout, value) and not copy:
        return value
    return home.empty(layout).copy_(value)


def full_precision(param: torch.Tensor, saved: Mapping[str, Any]) -> torch.Tensor:
    """A weight as the fp32 value that it and the companion in its state stand for."""
    for form in WEIGHT_FORMATS.values():
        value = saved.get(form.key) if form.key else None
        if value is None or param.dtype not in form.codes:
            continue
        value = from_bytes(value)
        if value.dtype != (form.companion or param.dtype):
            continue
        companion = torch.empty_like(param.detach(), dtype=value.dtype).copy_(value)
        values = numpy_codec.read_weight(form, param, companion)
        full = torch.empty_like(param.detach(), dtype=torch.float32)
        numpy_codec.flat(full).copy_(torch.from_numpy(values))
        return full
    return param.detach().float()
