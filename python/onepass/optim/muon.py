"""The Muon optimizer, and the groups of parameters that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ..engine.tensor_access import is_dtensor
from ..muon.batches import DTYPES, Direction, Settings, scratch_sizes
from ..muon.coefficients import NEWTON_SCHULZ, Triple
from ..muon.exchange import sharding_of
from ..muon.matrices import matrices_of
from ..muon.products import TorchProducts
from ..paging.options import bytes_of
from ..rules.group_options import drop_defaults, option
from ..rules.muon import MIXED, RULE, uses_muon
from ..rules.option_checks import check_choice
from .base import Optimizer
from .mixed_precision import EMBEDDINGS, Selection, select
from .options import Options, torch_keys

ADAMW = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "cautious_weight_decay": False,
}
"""What a group with ``use_muon=False`` does not set; its states are fp32."""

_OF_MUON = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
_OF_MATRICES = (*_OF_MUON, "split", "flatten")
_OF_ADAMW = ("betas", "amsgrad")
_OUTPUT_NAMES = ("lm_head", "head", "output", "classifier", "score", "embed_out")
"""What language models and classifiers call their output layer."""


class Muon(Optimizer):
    r"""Muon for matrices, as torch.optim.Muon, and AdamW for all other parameters, in one step.

    .. math::
        b &\leftarrow \mu b + (1 - \mu) g \\
        u &= \mu b + (1 - \mu) g \text{ (nesterov)},\; b \text{ (otherwise)} \\
        X &= u / \max(\lVert u \rVert_F, \epsilon) \\
        A &= X X^T,\; X \leftarrow a X + (b_k A + c A^2) X
            \quad\text{for each } (a, b_k, c) \\
        \theta &\leftarrow \theta - \eta r X - \eta\lambda\theta

    X is u with its singular values moved towards 1. r is :math:`\sqrt{\max(1, rows / cols)}`, or
    :math:`0.2 \sqrt{\max(rows, cols)}` with ``adjust_lr_fn="match_rms_adamw"``.

    Muon is for the matrices of hidden layers. A group with ``use_muon=False`` is stepped by AdamW:
    embeddings, the output layer, norms and biases. :func:`onepass.muon_groups` makes both groups::

        onepass.Muon(onepass.muon_groups(model, lr=0.02, adamw_lr=3e-4))

    A parameter [M, N] is one matrix. Three dimensions are a batch of matrices [..., M, N], such as
    experts; more are a convolution, which is flattened to [out, rest]. The group option ``flatten``
    (True or False) overrides this. The group option ``split=(n, dim)`` orthogonalises n equal parts
    of a dimension separately: ``split=(3, 0)`` for a fused query-key-value matrix, or one part for
    each head.

    The two sweeps have the same bits on every backend. The products between them have the same bits
    from run to run on one device. The directions and the workspace of the products stay allocated
    between steps (docs/algorithms/muon.md).

    State: ``momentum_buffer`` (b) of the parameter's shape; with ``use_muon=False`` that of
    :class:`AdamW`; ``step``.

    Args:
        params: tensors, named tensors or parameter groups, as in torch.optim.
        lr: :math:`\eta`, a float or a 0-dim tensor. Groups with ``use_muon=False`` do not take this
            value: what they do not set is AdamW's default (lr 1e-3, betas (0.9, 0.999), eps 1e-8,
            weight_decay 1e-2, states "fp32").
        weight_decay: :math:`\lambda`, always decoupled.
        momentum: :math:`\mu`, at least 0.
        nesterov: use Nesterov momentum.
        ns_coefficients: one triple :math:`(a, b_k, c)`, a list with one triple for each iteration,
            or a name: "newton_schulz" (the default) or "polar_express".
        eps: :math:`\epsilon`, the smallest norm.
        ns_steps: number of iterations, at most 99. A shorter list of coefficients repeats its last
            triple.
        adjust_lr_fn: "original" (the default, also None) or "match_rms_adamw".
        cautious_weight_decay: keyword-only; decay a weight only in steps whose update does not move
            it away from 0 (Chen et al., "Cautious weight decay", 2025), where update times weight
            is at least 0. Also per parameter group.
        precision: dtype of the directions and the products, "fp32" or "bf16"; None (default) for
            "bf16" on a GPU and "fp32" elsewhere. On a CPU without AVX-512, the products of bf16
            directions are fp32, because torch's bf16 products are slow there.
        muon_scratch: most memory for the workspace of one batch of matrices, in bytes or as a size
            such as "256MB". A single large matrix may need more.
        options: keyword-only, see :class:`Options`. In a group with matrices, ``states`` must be
            "fp32" or "bf16", and ``decoupled_weight_decay`` must be True.

    Raises:
        ValueError: an argument is out of range, or a parameter of a group with matrices has fewer
            than two dimensions, or is a DTensor that is sharded over several dimensions of its
            mesh.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024);
    "match_rms_adamw": Liu et al., "Muon is scalable for LLM training" (2025); "polar_express":
    Amsel et al., "The Polar Express" (2025).
    """

    rule = MIXED
    decoupled = True
    group_options = ("use_muon", "split", "flatten", *_OF_ADAMW)
    needs_matrices = True
    products: Settings

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Triple | Sequence[Triple] = NEWTON_SCHULZ,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        *,
        cautious_weight_decay: bool = False,
        precision: Literal["fp32", "bf16"] | None = None,
        muon_scratch: int | str = "256MB",
        **options: Unpack[Options],
    ) -> None:
        self.products = _settings(precision, muon_scratch)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "cautious_weight_decay": cautious_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_options(self, group: Mapping[str, Any]) -> None:
        """See :meth:`Optimizer.check_options`."""
        if uses_muon(group):
            # Groups of matrices do not store it, as those of torch.optim.Muon.
            group = {"decoupled_weight_decay": True, **group}
        super().check_options(group)
        if not uses_muon(group):
            return
        for name in _OF_ADAMW:
            if name in group:
                raise ValueError(f"{name} is an option of AdamW: it needs use_muon=False")
        if not group.get("decoupled_weight_decay", True):
            raise ValueError(
                "decoupled_weight_decay must be True for Muon: a decay that is added to the "
                "gradient would be orthogonalised with it"
            )
        states = option(group, "states")
        if states not in RULE.formats:
            raise ValueError(
                f"states={states!r} is not for Muon's momentum, only "
                f"{' and '.join(map(repr, RULE.formats))} are: its codes are finer for small "
                "values, but the error of an orthogonalised matrix depends on the error relative "
                "to the whole matrix (docs/algorithms/muon.md)"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See :meth:`Optimizer.add_param_group`; also checks that Muon's parameters are matrices.

        Raises:
            ValueError: as :meth:`Optimizer.add_param_group`. Also if a group with
                ``use_muon=False`` has an option of Muon, or if a parameter of another group has
                fewer than two dimensions, does not fit ``split``, or is a DTensor that is sharded
                over several dimensions of its mesh.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)
            return
        muon = uses_muon(param_group)
        if muon:
            self._check_matrices(param_group)
        else:
            given = [name for name in _OF_MATRICES if name in param_group]
            if given:
                raise ValueError(
                    f"{given[0]} is an option of Muon: a group with use_muon=False is stepped by "
                    "AdamW"
                )
            param_group = {"states": "fp32", **ADAMW, **param_group}
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if muon:
            # Muon's weight decay is always decoupled; torch.optim.Muon has no such key.
            added.pop("decoupled_weight_decay", None)
            if added.get("use_muon"):
                del added["use_muon"]
        else:
            for name in _OF_MUON:
                added.pop(name, None)
        drop_defaults(added, torch_keys(type(self)))

    def _check_matrices(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError if a parameter cannot be orthogonalised."""
        self.check_options({**self.defaults, **param_group})
        params = param_group.get("params")
        if isinstance(params, Iterable) and not isinstance(params, (torch.Tensor, set, frozenset)):
            params = param_group["params"] = list(params)
        for i, item in enumerate([params] if isinstance(params, torch.Tensor) else params or ()):
            param = item[1] if isinstance(item, tuple) and len(item) == 2 else item
            if isinstance(param, torch.Tensor) and not is_lazy(param):
                which = f"parameter {i} of the group, shape {tuple(param.shape)},"
                if is_dtensor(param):
                    sharding_of([param], [which])
                matrices_of(param, param_group, which)

    def scratch_sizes(self, device: torch.device) -> list[int]:
        """See :meth:`Stepping.scratch_sizes`; the parameters must not be DTensors."""
        found = [
            Direction(matrices_of(p, group, ""), group, tuple(p.shape), p.stride())
            for group in self.param_groups
            if uses_muon(group)
            for p in group["params"]
            if p.requires_grad
        ]
        return scratch_sizes(found, self.products, device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "products": self.products}


def _settings(precision: str | None, scratch: int | str) -> Settings:
    """The options of the products, after a check."""
    if precision is not None:
        check_choice("precision", precision, DTYPES)
    size = scratch if type(scratch) is int else bytes_of(scratch)
    if size is None or size < 0:
        raise ValueError(
            f"muon_scratch must be a number of bytes or a size such as '256MB'; got {scratch!r}"
        )
    return Settings(precision, size, TorchProducts())


def muon_groups(
    model: nn.Module,
    lr: float | torch.Tensor = 1e-3,
    adamw_lr: float | torch.Tensor = 1e-3,
    adamw: Selection = EMBEDDINGS,
    **options: Any,
) -> list[dict[str, Any]]:
    """Makes the groups of :class:`Muon`: matrices of hidden layers, and everything else.

    AdamW gets the parameters with fewer than two dimensions (norms and biases), the embeddings, the
    weights that are tied to one of them, and the output layer. The output layer is the last
    ``nn.Linear`` of the model, if its weight has the shape of an embedding, if it is called
    ``lm_head``, ``head``, ``output``, ``classifier``, ``score`` or ``embed_out``, or if the model
    has no embedding and several linear layers. Name another output layer in ``adamw``. Weights of
    convolutions are flattened to [out, rest].

    Args:
        model: each of its parameters is put into exactly one group, in the model's order. A shared
            parameter is listed once. The model is not changed.
        lr: the learning rate of the matrices.
        adamw_lr: the learning rate of all other parameters.
        adamw: module types and names of the parameters that AdamW steps besides vectors and the
            output layer, as ``keep`` of :func:`cast_model`. To add to the default:
            ``(*onepass.EMBEDDINGS, "head")``.
        options: further options of the group of matrices, such as ``weight_decay``.

    Returns:
        At most three groups, each a dictionary as for torch.optim: matrices and batches of
        matrices; weights of one-dimensional convolutions, with ``flatten=True``; and the group
        with ``use_muon=False``. Groups without parameters are left out.

    Raises:
        ValueError: the model has no module or tensor of a given name, or a lazy parameter has no
            shape yet.
    """
    lazy = [name for name, param in model.named_parameters() if is_lazy(param)]
    if lazy:
        raise ValueError(
            f"parameter {lazy[0]!r} has no shape yet, because it is lazy: run the model once first"
        )
    _, chosen = select(model, adamw, "adamw")
    chosen |= _output_layer(model)
    flat = {
        param
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for param in module.parameters(recurse=False)
    }
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "lr": lr, **options},
        "flat": {"params": [], "lr": lr, "flatten": True, **options},
        "rest": {"params": [], "lr": adamw_lr, "use_muon": False},
    }
    for param in model.parameters():
        kind = "flat" if param in flat else "matrices"
        kind = "rest" if param.dim() < 2 or param in chosen else kind
        groups[kind]["params"].append(param)
    return [group for group in groups.values() if group["params"]]


def _output_layer(model: nn.Module) -> set[torch.Tensor]:
    """The parameters of the output layer: see :func:`muon_groups`."""
    linear = [pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear)]
    if not linear:
        return set()
    name, last = linear[-1]
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, EMBEDDINGS)]
    named = name.rpartition(".")[2] in _OUTPUT_NAMES or last.weight.shape in shapes
    alone = not shapes and len(linear) > 1
    return set(last.parameters(recurse=False)) if named or alone else set()
