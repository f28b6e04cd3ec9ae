"""onepass's optimizers in torchtitan. Importing this module imports torchtitan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..optim.registry import classes
from .frameworks import import_framework

_titan = import_framework("torchtitan.components.optimizer", package="torchtitan")


class OnepassOptimizersContainer(_titan.OptimizersContainer):  # type: ignore[misc, name-defined]
    """torchtitan's container of optimizers, in which ``optimizer_name`` is a class of onepass.

    A name that onepass does not have is looked up by torchtitan: ``"DistMuon"``. Names are those of
    the classes: ``"AdamW"``, ``"Lion"``, ``"AdamW8bit"``. Use its ``Config`` as ``optimizer`` of
    the configuration of a torchtitan trainer. ``optimizer_kwargs`` of a group are the keywords of
    the class; step-wide ones, such as ``max_grad_norm``, go into
    ``optimizer_factory_kwargs_by_name``, because a group cannot have them. torchtitan passes
    ``fused`` and ``foreach``, which onepass accepts.

    Raises:
        NotImplementedError: neither onepass nor torchtitan has an optimizer of that name.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_titan.OptimizersContainer.Config):  # type: ignore[misc, name-defined]
        """The configuration; its ``build(model_parts=...)`` makes the container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        known = {kind.__name__: kind for kind in classes().values()}
        if name in known:
            return known[name]
        resolve: Any = _titan.OptimizersContainer._resolve_optimizer_factory
        return resolve(name)  # type: ignore[no-any-return]
