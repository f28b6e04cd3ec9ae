"""The names of a model's parameters, as trainer and server both see them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing add to the names of parameters."""


def _type(module: str, name: str) -> Any:
    """A type of a module of torch; None if the module is not imported."""
    return getattr(sys.modules.get(module), name, None)


def named_tensors(target: Any) -> dict[str, torch.Tensor]:
    """The parameters of a model, tied parameters under each of their names; or a state dict.

    The names do not have the prefixes of DistributedDataParallel, torch.compile and activation
    checkpointing.

    Raises:
        TypeError: target is neither a module nor a mapping of names to tensors.
        ValueError: the model is wrapped by FSDP1, whose parameters are pieces of unknown place.
    """
    if isinstance(target, torch.nn.Module):
        fsdp1 = _type("torch.distributed.fsdp", "FullyShardedDataParallel")
        if fsdp1 is not None and any(isinstance(m, fsdp1) for m in target.modules()):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) does not say where its pieces are in the "
                "parameters: shard the model with fully_shard (FSDP2)"
            )
        ddp = _type("torch.nn.parallel.distributed", "DistributedDataParallel")
        if ddp is not None and isinstance(target, ddp):
            target = target.module
        found = dict(target.named_parameters(remove_duplicate=False))
    elif isinstance(target, Mapping):
        found = {name: value for name, value in target.items() if isinstance(value, torch.Tensor)}
    else:
        raise TypeError(f"model must be a torch.nn.Module or a state dict; got {type(target)}")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = tensor
    return named


def tied_names(named: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Second name of a tensor that has several -> its first name."""
    first: dict[torch.Tensor, str] = {}
    return {
        name: first[tensor]
        for name, tensor in named.items()
        if first.setdefault(tensor, name) != name
    }
