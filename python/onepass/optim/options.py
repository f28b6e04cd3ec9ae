"""The keyword-only options of every optimizer class, for type checkers, ``help()`` and errors."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_type_hints

import torch
from typing_extensions import TypedDict  # torch's own dependency

from ..paging.options import Paging
from ..suggestions import did_you_mean

States = Literal["fp32", "bf16", "mx8", "mx4", "dynamic8"]
Weights = Literal["native", "stochastic", "kahan", "master", "split16", "split8"]
Backend = Literal["cpu", "cuda", "triton", "reference"]


class Options(TypedDict, total=False):
    """The keyword-only options of every optimizer class.

    Attributes:
        maximize: maximize the objective instead of minimizing it (default False).
        foreach: accepted for compatibility with torch.optim, without effect: the step is always
            fused (default None).
        fused: ``fused=True`` makes torch.amp.GradScaler leave unscaling and skipping to the step,
            as in torch.optim (default None). The step is fused with every value.
        capturable: accepted for compatibility with torch.optim, without effect: the step can
            always be captured in a CUDA graph (default False).
        differentiable: must be False, because autograd does not record the step.
        decoupled_weight_decay: subtract lr * weight_decay * param from the weight instead of adding
            weight_decay * param to the gradient (default False; True for AdamW and Lion).
        states: format of the states: "fp32", "bf16", "mx8", "mx4" or "dynamic8" (docs/formats.md).
            The default is "fp32", except in classes with a bit width in their name. Also per
            parameter group.
        weights: format of bf16 and fp16 weights. "native" (default) rounds to nearest. The others
            keep more precision: "stochastic", "kahan", "master" and, for bf16 only, "split16" and
            "split8". Also per parameter group.
        max_grad_norm: clip gradients to this global norm inside the step, as
            torch.nn.utils.clip_grad_norm_ does before it. None (default) does not clip. Clipping
            reads the gradients a second time but does not write them.
        norm_type: type of that norm: 2.0 (default) or math.inf (the largest magnitude).
        skip_nonfinite: skip the step if a gradient is infinite or NaN: parameters, states and step
            counters do not change (default False).
        zero_grads: set gradients to zero in the step, even if the step is skipped (default False).
        ema_decay: d of an fp32 average of each weight, e <- d e + (1 - d) w, which is stored in
            ``state[param]["ema"]`` and starts at the weight. None (default) stores no average. Also
            per parameter group.
        track_changes: record in the step which weights change their stored bits, one bit per
            weight, until :func:`onepass.take_delta` takes the changes (default False;
            docs/weight-sync.md). Set in the constructor only.
        telemetry: measure norms in the step, see :attr:`Optimizer.telemetry` (default False).
        norm_group: process group over which norms are computed, or True for all ranks. Set it if
            the optimizers of these ranks have different parameters (docs/zero.md). With None
            (default), ordinary parameters are assumed to be equal on all ranks; the ranks of
            DTensors are known from the DTensors.
        paged: budget in bytes for states on each device; the other states are stored in host memory
            (docs/paging.md). A number of bytes, a size such as "2GB", or True for 0 bytes. The
            default is False, which disables paging, except in the Paged classes.
        backend: "cpu", "cuda", "triton" or "reference"; None (default) selects one per device.
        seed: seed of the random bits that stochastic formats draw (default 0). Also per parameter
            group.
    """

    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    decoupled_weight_decay: bool | None
    states: States | None
    weights: Weights
    paged: bool | int | str | Paging | None
    max_grad_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    zero_grads: bool
    ema_decay: float | None
    telemetry: bool
    track_changes: bool
    norm_group: Any
    backend: Backend | None
    seed: int


ELSEWHERE = {
    "optim_bits": 'states="mx8" stores 8 bits, states="fp32" 32',
    "is_paged": "paged=True",
    "min_8bit_size": 'give small parameters a group with states="fp32" '
    "(onepass.parameter_groups makes such groups)",
    "percentile_clipping": "max_grad_norm=... clips by the global norm",
    "block_wise": 'states="mx8", "mx4" and "dynamic8" are always in blocks',
    "max_unorm": "max_grad_norm=... clips by the global norm",
    "master_weight_bits": 'weights="split8" keeps 24 bits of a weight, "split16" and "master" 32',
    "quantize": 'states="mx8"',
    "bf16_stochastic_round": 'weights="stochastic"',
    "use_kahan_sum": 'weights="kahan"',
    "kahan_sum": 'weights="kahan"',
    "gradient_release": "onepass.release_gradients(model, optimizer)",
    "stochastic_rounding": 'weights="stochastic"',
    "master_weights": 'weights="master"',
    "adam_w_mode": "onepass.AdamW or onepass.Adam",
    "set_grad_none": "zero_grad(set_to_none=...)",
}
"""Keyword of bitsandbytes, FlashOptim, torchao, optimi, apex or DeepSpeed -> what to use in
onepass."""


def refuse(name: str, kind: str, known: set[str]) -> None:
    """Raises TypeError for an unknown keyword, with a suggestion.

    Args:
        name: the unknown keyword.
        kind: name of the optimizer class.
        known: the keywords of the class.
    """
    hint = ELSEWHERE.get(name)
    if hint is not None:
        raise TypeError(f"{kind} has no keyword {name!r}; the equivalent in onepass: {hint}")
    meant = did_you_mean(name, known, 0.6) or f". Its keywords: {', '.join(sorted(known))}"
    raise TypeError(f"{kind} has no keyword {name!r}{meant}")


_TORCH_KEYS: dict[type, frozenset[str]] = {}


def torch_keys(kind: type) -> frozenset[str]:
    """The option keys in parameter groups of the torch.optim class of the same name.

    For a class that torch.optim does not have: maximize and decoupled_weight_decay.
    """
    if kind not in _TORCH_KEYS:
        found = frozenset(("maximize", "decoupled_weight_decay"))
        for base in reversed(kind.__mro__):
            twin = getattr(torch.optim, base.__name__, None)
            if (
                twin is not None
                and base.__module__.startswith("onepass.optim.")
                and (base.__name__ != "Optimizer")
            ):
                param = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))
                found = frozenset(twin([param], lr=1e-3).param_groups[0])
        _TORCH_KEYS[kind] = found
    return _TORCH_KEYS[kind]


def describe(kind: type, defaults: dict[str, Any]) -> None:
    """Sets the signature of a class to all of its keywords and documents them in its docstring.

    Args:
        kind: a class whose ``__init__`` takes ``**options: Unpack[Options]``.
        defaults: the default of each option.
    """
    hints = get_type_hints(Options)
    signature = inspect.signature(kind.__init__, eval_str=True)  # type: ignore[misc]
    own = [p for p in signature.parameters.values() if p.name != "self"]
    own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {p.name for p in own}
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hints[name]
        )
        for name in hints
        if name not in taken
    ]
    kind.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    text = inspect.cleandoc(Options.__doc__ or "")
    section = text[text.index("Attributes:") + len("Attributes:") :].rstrip()
    kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n\nOptions, keyword-only:{section}\n"
