"""Which parts of a model are in fewer bits: the cast of the model, and groups to match it."""

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
    """Casts a model in place for training in 16 bits, but for what is to stay in fp32.

    Parameters and buffers of floating point become ``dtype``; what ``keep`` selects becomes float32
    (running statistics with their norm); integers, booleans and complex numbers stay. A tensor that
    several modules share is cast once, and is kept if one of them is. The parameters remain the
    same objects, so that ties and optimizers made before hold; gradients are cast along.

    A module that is kept computes in float32: hooks cast its inputs of floating point to float32
    and its outputs to ``dtype``. (A parameter or buffer kept by its own name has no hook: its
    module must know what to do with it.) Call it again to choose otherwise.

    Args:
        model: the module to cast; it takes inputs of ``dtype`` then.
        dtype: torch.bfloat16, or torch.float16.
        keep: types of modules (their subclasses too), and names as in ``named_modules()``,
            ``named_parameters()`` and ``named_buffers()``. A module counts with everything in it.

    Returns:
        The model itself.

    Raises:
        ValueError: another dtype, a name that the model does not have, or a lazy parameter that has
            no shape yet; nothing has been changed then.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16; got {dtype}")
    roots, kept = select(model, keep, "keep")
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]!r} has no shape yet: run the model once first")
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
    """Groups of a model's parameters for one optimizer that is given low-precision formats.

    ::

        onepass.AdamW(onepass.parameter_groups(model), states="mx8", weights="split8")

    Parameters in float32 get ``weights="native"``: a weight format is for 16 bits and refuses them.
    Parameters that ``fp32_states`` selects get ``states="fp32"``: those of embeddings, whose rows
    are seldom updated, and of norms, which are few. Everything else takes the optimizer's own
    formats, whatever its size. Nothing is changed.

    Args:
        model: every parameter of it comes into exactly one group, shared ones once, frozen ones
            too, in the model's order.
        fp32_states: types of modules and names, as ``keep`` of :func:`cast_model`; ``()`` for none.
            A parameter that several modules share is selected if one of them is.

    Returns:
        At most four groups, each a dictionary as torch.optim takes it, in the order in which the
        model first needs them; add options such as ``lr`` to them as you like.

    Raises:
        ValueError: a name that the model does not have.
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
    """The modules that are selected, and all tensors that are, those in the modules included."""
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
                f"{argument} names {name!r}: the model has no module, parameter or buffer of that "
                "name (see named_modules(), named_parameters() and named_buffers())"
            )
    chosen = {m for name, m in modules.items() if name in names or isinstance(m, tuple(types))}
    held = {tensor for module in chosen for tensor in _tensors(module)}
    return chosen, held | {tensors[name] for name in names if name in tensors}


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """What a cast would change of a module and of those in it."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


# --- the casts around a module in fp32 -------------------------------------------------------

_HANDLES = "_onepass_casts"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value
    )


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _cast_outputs(module: nn.Module, args: Any, output: Any, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _add_casts(
    module: nn.Module,
    dtype: torch.dtype,
    roots: set[nn.Module],
    kept: set[torch.Tensor],
    inside: bool = False,
) -> None:
    """Hooks on the outermost modules that are in fp32: mixed dtypes would fail in them.

    Those are the selected ones and any that has all its tensors from them, as an output layer tied
    to an embedding. A list of modules is never called: its members are hooked instead.
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
