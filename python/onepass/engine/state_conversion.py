"""Conversion of saved states, companions and averages to the formats of a parameter group.

``optimizer.state[param]`` holds these keys:

- for each state of the rule, its codes under torch.optim's key and, in formats with blocks, their
  scales under ``<key>_scale``;
- the companion of the weight (the extra bits of its weight format) under the format's key;
- the average of the weight under ``ema``;
- ``step``;
- ``stride``, the strides of a non-contiguous parameter with packed codes: packed codes are
  one-dimensional, so their shape does not show the element order.
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
    """Fills a zero-initialised state with a positive value."""
    if form.scale is None:
        held[key].fill_(value)
        return
    # All blocks are equal: encode one and copy its code and scale.
    values = np.full(form.block, value, np.float32)
    data = torch.empty(form.block // form.packed, dtype=form.dtype, device="cpu")
    scale = torch.empty(1, dtype=form.scale, device="cpu")
    numpy_codec.write_states(form, ["second"], (values,), {0: data}, {0: scale})
    held[key].fill_(data[0].item())
    held[scale_key(key)].fill_(scale[0].item())


def packed_order(param: torch.Tensor, form: StateFormat) -> dict[str, tuple[int, ...]]:
    """The ``stride`` entry of a parameter's state; empty if the codes are not packed or the
    parameter is contiguous."""
    if form.packed == 1 or param.is_contiguous():
        return {}
    return {STRIDE: param.stride()}


def stale_keys(state: Mapping[str, Any], held: Mapping[str, Any], rule: Rule) -> list[str]:
    """Keys of scales, companions, averages, strides and ``codes_step`` that held lacks."""
    kept = COMPANIONS | {STRIDE, EMA, CODES_STEP} | set(map(scale_key, rule.keys))
    return [key for key in state if key in kept and key not in held]


def _tensor(value: Any, which: str) -> torch.Tensor:
    """The value, or ValueError if it is not a tensor with memory."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{which} is a {type(value).__name__}: it is the state of another parameter"
        )
    check_memory(value, which)
    return value


def format_of(data: torch.Tensor, scale: torch.Tensor | None, which: str) -> StateFormat:
    """The format of a state, from the dtypes of its codes and scales.

    Raises:
        ValueError: no format has these dtypes; the message names the state.
    """
    if (scale is None) != data.is_floating_point():
        raise ValueError(
            f"{which} is {data.dtype} {'without' if scale is None else 'with'} a scale: uint8 "
            "codes need a scale, floating-point values have none"
        )
    scales = None if scale is None else scale.dtype
    for form in STATE_FORMATS.values():
        if (form.dtype, form.scale) == (data.dtype, scales):
            return form
    if scale is None:
        return STATE_FORMATS["fp32"]  # torch.optim's states of an fp16 weight are fp16
    raise ValueError(
        f"{which} is {data.dtype} with {scales} scales: no state format has this combination"
    )


def fit_states(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    rule: Rule,
    form: StateFormat,
    which: str,
    copy: bool = False,
    home: Home | None = None,
) -> dict[str, torch.Tensor]:
    """Converts the saved states of a parameter to a format, its layout and a storage location.

    Tensors that already match are returned unchanged unless copy is set. A conversion rounds to
    nearest.

    Args:
        saved: state key -> tensor.
        param: the parameter, whose shape and strides the states get.
        rule: the rule of the optimizer.
        form: the wanted format.
        which: name of the parameter, for error messages.
        copy: whether to copy tensors that already match.
        home: where the states are stored; None for the parameter's device.

    Raises:
        ValueError: a value is not a tensor of the parameter's size; the message names it.
    """
    slots = [(i, key) for i, key in enumerate(rule.keys) if saved.get(key) is not None]
    if not slots:
        return {}
    home = home or OnDevice(param.device)
    found, source = _checked_states(saved, param, rule, slots, which)
    strides = {
        key: _saved_stride(saved, param, which)
        if rule.format_of(key, source).packed > 1
        else found[key].stride()
        for _, key in slots
    }
    layouts = [
        layout
        for _, key in slots
        for layout in state_layouts(param, key, rule.format_of(key, form))
    ]
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
    saved: Mapping[str, Any],
    param: torch.Tensor,
    rule: Rule,
    slots: list[tuple[int, str]],
    which: str,
) -> tuple[dict[str, torch.Tensor], StateFormat]:
    """The saved states and scales of these slots as dense tensors, and their format.

    Raises:
        ValueError: a value is not a tensor of the parameter's size, or the formats differ.
    """
    found: dict[str, torch.Tensor] = {}
    forms, plain = set(), set()  # the formats of moments, and of weights
    for _, key in slots:
        data = _tensor(saved[key], f"{key} of {which}")
        scale = saved.get(scale_key(key))
        if scale is not None:
            scale = _tensor(scale, f"{scale_key(key)} of {which}")
        if scale is not None and scale.dim() == 0:
            scale = None  # a 0-dim scale marks fp32 values that were saved in place of codes
        source = format_of(data, scale, f"{key} of {which}")
        wanted = state_layouts(param, key, source)
        for layout, value in zip(wanted, [data] if scale is None else [data, scale], strict=True):
            if len(layout.shape) == 1 and value.numel() == layout.numel:
                value = value.reshape(-1)  # scales of a DTensor have several dimensions
            if tuple(value.shape) != layout.shape:
                raise ValueError(
                    f"{layout.key} of {which} is {tuple(value.shape)}, but must be "
                    f"{tuple(layout.shape)}: it is the state of another parameter"
                )
            found[layout.key] = value if is_dense(value) else value.contiguous()
        if source.scale is None:
            found[key] = found[key].to(source.dtype)
        if rule.kind_of(key) != "weight":
            forms.add(source.name)
        elif source.for_weights is None:
            plain.add(source.name)
        else:
            raise ValueError(
                f"{key} of {which} is in the format {source.name!r}, but a weight is stored in "
                "fp32 or bf16"
            )
    if not any(STATE_FORMATS[name].for_weights for name in forms):
        forms |= plain
    elif plain:  # beside codes in blocks, weights are fp32
        found |= {key: found[key].float() for _, key in slots if rule.kind_of(key) == "weight"}
    if len(forms) > 1 and any(STATE_FORMATS[name].scale is not None for name in forms):
        raise ValueError(f"the states of {which} are in different formats: {sorted(forms)}")
    if len(forms) > 1:
        found, forms = {key: value.float() for key, value in found.items()}, {"fp32"}
    return found, STATE_FORMATS[forms.pop()]


def _saved_stride(saved: Mapping[str, Any], param: torch.Tensor, which: str) -> tuple[int, ...]:
    """The element order of packed codes, as strides for the parameter's shape."""
    stride = saved.get(STRIDE)
    if stride is None:
        return torch.empty(param.shape, device="meta").stride()
    stride = tuple(stride)
    if len(stride) != param.dim() or not is_dense(
        torch.empty_strided(param.shape, stride, device="meta")
    ):
        raise ValueError(
            f"{STRIDE} of {which} is {stride}, which does not fit its shape: it is the state of "
            "another parameter"
        )
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
    """Decodes every state and encodes it in the new format, in the parameter's memory order."""
    scaled = [(i, key) for i, key in slots if rule.format_of(key, source).scale is not None]
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
        {i: held[scale_key(key)] for i, key in slots if scale_key(key) in held},
    )


def to_bytes(companion: torch.Tensor) -> torch.Tensor:
    """Views an int16 companion as uint8 [*shape, 2]; returns any other companion unchanged.

    State dicts and DTensors store the uint8 view because process groups do not send int16.
    """
    if companion.dtype != torch.int16:
        return companion
    return companion.unsqueeze(-1).view(torch.uint8)


def from_bytes(companion: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`to_bytes`; returns a companion that is not uint8 unchanged."""
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
    """Converts the saved companion of a weight to a format; None if the format has no companion.

    A new companion represents the weight's current value exactly. A companion of another format is
    decoded with the current weight and encoded again.

    Args:
        saved: state key -> tensor.
        param: the weight.
        form: the wanted weight format.
        which: name of the parameter, for error messages.
        copy: whether to copy a companion that already matches.
        home: where the companion is stored; None for the parameter's device.

    Raises:
        ValueError: the saved companion is not a tensor of the parameter's size.
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
            f"{key} of {which} is {tuple(value.shape)}, but must be {tuple(layout.shape)}: it is "
            "the state of another parameter"
        )
    if key == form.key and value.dtype == layout.dtype:
        if home.fits(layout, value) and not copy:
            return value
        return home.empty(layout).copy_(value)
    companion = home.empty(layout)
    _encode_companion(full_precision(param, {key: value}), param, form, companion)
    return companion


def _encode_companion(
    full: torch.Tensor, param: torch.Tensor, form: WeightFormat, companion: torch.Tensor
) -> None:
    """Fills a companion such that it and the weight, which stays as it is, represent fp32 values.

    Formats round differently near the midpoint between two weights. A value there is moved towards
    the weight by 1, then by 256 fp32 ulps. If it still rounds to another weight, it is stale, and
    the companion represents the weight itself.

    Args:
        full: fp32 values of the weight's shape and strides.
        param: the weight.
        form: the weight format.
        companion: changed in place.
    """
    values = numpy_codec.to_array(full)
    weight = torch.empty_like(param.detach())
    numpy_codec.write_weight(form, values, weight, companion)
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


def fit_ema(
    saved: Mapping[str, Any],
    param: torch.Tensor,
    which: str,
    copy: bool = False,
    home: Home | None = None,
) -> torch.Tensor:
    """The saved fp32 average of a weight; a new average starts at the weight's current value.

    Args:
        saved: state key -> tensor.
        param: the weight.
        which: name of the parameter, for error messages.
        copy: whether to copy an average that already matches.
        home: where the average is stored; None for the parameter's device.

    Raises:
        ValueError: the saved average is not a tensor of the parameter's size; the message names it.
    """
    layout = ema_layout(param)
    home = home or OnDevice(param.device)
    if saved.get(EMA) is None:
        # Without a companion, copy_ converts the weight: this avoids a temporary fp32 tensor.
        alone = not any(saved.get(key) is not None for key in COMPANIONS)
        weight = param.detach() if alone else full_precision(param, saved)
        return home.empty(layout).copy_(weight)
    value = _tensor(saved[EMA], f"{EMA} of {which}")
    if tuple(value.shape) != layout.shape:
        raise ValueError(
            f"{EMA} of {which} is {tuple(value.shape)}, but must be {tuple(layout.shape)}: it is "
            "the state of another parameter"
        )
    if home.fits(layout, value) and not copy:
        return value
    return home.empty(layout).copy_(value)


def full_precision(param: torch.Tensor, saved: Mapping[str, Any]) -> torch.Tensor:
    """The fp32 value that a weight and the companion in its state represent together."""
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
