"""Casts a model to 16 bits except selected parts, and makes matching parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""The normalisations of torch.nn. Add your own: ``keep=(*onepass.NORMS, MyNorm)``."""

EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)

Selection = Iterable["type[nn.Module] | str"]
"""Parts of a model: types of modules, and names of modules, parameters and buffers."""

_Model = TypeVar("_Model", bound=nn.Module)


def cast_model(
    model: _Model, dtype: torch.dtype = torch.bfloat16, keep: Selection = NORMS
) -> _Model:
    """Casts a model in place for training in 16 bits, except the parts that ``keep`` selects.

    Floating-point parameters and buffers are cast to ``dtype``, or to float32 if ``keep`` selects
    them; running statistics are kept with their norm. Integer, boolean and complex tensors are not
    changed. A tensor that several modules share is kept if one of these modules is kept. Parameters
    remain the same objects, so tied weights and existing optimizers stay valid. Gradients are cast
    with their parameters.

    A kept module computes in float32: hooks cast its floating-point inputs to float32 and its
    outputs to ``dtype``. A parameter or buffer that is kept by its own name has no hooks; its
    module must handle the float32 tensor. A second call replaces the selection.

    Args:
        model: the module to cast; afterwards it takes inputs of ``dtype``.
        dtype: torch.bfloat16 or torch.float16.
        keep: module types (including their subclasses), and names as in ``named_modules()``,
            ``named_parameters()`` and ``named_buffers()``. A selected module includes all of its
            submodules.

    Returns:
        The model itself.

    Raises:
        ValueError: the dtype is not supported, the model has no module or tensor of a given name,
            or a lazy parameter has no shape yet; nothing is changed.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16; got {dtype}")
    roots, kept = select(model, keep, "keep")
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"parameter {lazy[0]!r} has no shape yet, because it is lazy: run the model once first"
        )
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        wanted = torch.float32 if tensor in kept else dtype
        if tensor.is_floating_point() and tensor.dtype != wanted:
            grad, tensor.grad = tensor.grad, None
            tensor.data = tensor.data.to(wanted)
            if grad is not None:
                tensor.grad = grad.to(wanted)
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
    _add_casts(model, dtype, roots, kept)
    return model


def parameter_groups(
    model: nn.Module, fp32_states: Selection = (*EMBEDDINGS, *NORMS)
) -> list[dict[str, Any]]:
    """Makes parameter groups of a model for an optimizer with low-precision formats.

    ::

        onepass.AdamW(onepass.parameter_groups(model), states="mx8", weights="split8")

    float32 parameters get ``weights="native"``, because the other weight formats store 16-bit
    weights. Parameters that ``fp32_states`` selects get ``states="fp32"``; by default these are
    embeddings, whose rows are updated rarely, and norms, which have few parameters. All other
    parameters use the optimizer's own formats, independent of their size. The model is not changed.

    Args:
        model: each of its parameters is put into exactly one group, in the model's order. This
            includes frozen parameters; a shared parameter is listed once.
        fp32_states: module types and names, as ``keep`` of :func:`cast_model`; ``()`` for none. A
            parameter that several modules share is selected if one of these modules is selected.

    Returns:
        At most four groups, in the order of their first parameter. Each is a dictionary as for
        torch.optim, to which you may add options such as ``lr``.

    Raises:
        ValueError: the model has no module or tensor of a given name.
    """
    _, selected = select(model, fp32_states, "fp32_states")
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for param in model.parameters():
        native, wide = param.dtype == torch.float32, param in selected
        options = ({"weights": "native"} if native else {}) | ({"states": "fp32"} if wide else {})
        groups.setdefault((native, wide), {"params": [], **options})["params"].append(param)
    return list(groups.values())


def select(
    model: nn.Module, which: Selection, argument: str
) -> tuple[set[nn.Module], set[torch.Tensor]]:
    """The selected modules, and the selected tensors including those of the modules.

    Args:
        model: the model to search.
        which: module types and names.
        argument: name of the caller's argument, for error messages.

    Raises:
        ValueError: an item is neither a type nor a name, or the model has no such name.
    """
    if isinstance(which, (str, type)):
        which = (which,)
    types, names = [], []
    for item in which:
        if isinstance(item, type) and issubclass(item, nn.Module):
            types.append(item)
        elif isinstance(item, str):
            names.append(item)
        else:
            raise ValueError(f"{argument} must hold types of modules and names; got {item!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in modules and name not in tensors:
            raise ValueError(
                f"{argument} names {name!r}, but the model has no module, parameter or buffer with "
                "this name (see named_modules(), named_parameters() and named_buffers())"
            )
    chosen = {m for name, m in modules.items() if name in names or isinstance(m, tuple(types))}
    held = {tensor for module in chosen for tensor in _tensors(module)}
    return chosen, held | {tensors[name] for name in names if name in tensors}


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """The floating-point parameters and buffers of a module and its submodules."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


# --- the casts around a module in fp32 -------------------------------------------------------

_HANDLES = "_onepass_casts"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts the floating-point tensors in a nested structure."""
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value
    )


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: casts the inputs of a kept module to float32."""
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _cast_outputs(module: nn.Module, args: Any, output: Any, dtype: torch.dtype) -> Any:
    """Forward hook: casts the output of a kept module to the model's dtype."""
    return _cast(output, dtype)


def _add_casts(
    module: nn.Module,
    dtype: torch.dtype,
    roots: set[nn.Module],
    kept: set[torch.Tensor],
    inside: bool = False,
) -> None:
    """Adds cast hooks to the outermost fp32 modules, whose operations would fail on mixed dtypes.

    These are the selected modules, and modules whose tensors all belong to selected modules, such
    as an output layer that is tied to an embedding. A container without ``forward``, such as
    ModuleList, is never called, so its submodules get the hooks.
    """
    inside = inside or module in roots
    held = _tensors(module)
    tied = any(True for _ in module.parameters(recurse=False)) and all(t in kept for t in held)
    callable_ = type(module).forward is not nn.Module.forward
    if held and callable_ and (inside or tied):
        if _HANDLES not in module.__dict__:
            module.__dict__[_HANDLES] = (
                module.register_forward_pre_hook(_cast_inputs, with_kwargs=True),
                module.register_forward_hook(partial(_cast_outputs, dtype=dtype)),
            )
        return
    for child in module.children():
        _add_casts(child, dtype, roots, kept, inside)
