"""The keyword-only options that every class takes: for type checkers, ``help()`` and errors."""

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
    """The keyword-only options that every class takes.

    Attributes:
        maximize: ascend instead of descend (default False).
        foreach, fused, capturable: as in torch.optim, accepted: the step is always fused and can be
            captured (defaults None, None, False). ``fused=True`` also makes torch.amp.GradScaler
            leave unscaling and skipping to the step, as with torch.optim.
        differentiable: only False; autograd does not see the step.
        decoupled_weight_decay: take lr * weight_decay * param off the weight instead of adding
            weight_decay * param to the gradient (default: True for AdamW and Lion).
        states: format of the states, also per parameter group: "fp32" (default; classes named for
            their bits have another), "bf16", "mx8", "mx4" or "dynamic8" (docs/formats.md).
        weights: how bf16 and fp16 weights keep their precision, also per group: "native" (default),
            rounded to nearest, "stochastic", "kahan", "master"; bf16 alone "split16", "split8".
        max_grad_norm: gradients are clipped to this global norm inside the step, as
            torch.nn.utils.clip_grad_norm_ would before it; None (default) clips nothing. Gradients
            are read once more for it, not rewritten.
        norm_type: of that norm: 2.0 (default) or math.inf, the largest magnitude.
        skip_nonfinite: when a gradient is infinite or NaN, leave parameters, states and step
            counters as they are (default False).
        zero_grads: set gradients to zero in the step, of a skipped one too (default False).
        ema_decay: keep an fp32 average of each weight, e <- d e + (1 - d) w, under
            ``state[param]["ema"]``, also per group (default None: none). It starts at the weight.
        telemetry: measure norms in the step, see :attr:`Optimizer.telemetry` (default False).
        norm_group: of ranks whose optimizers each have other parameters, a process group or True
            for all ranks: norms are taken over all of them (default None: parameters that are no
            DTensors are the same on every rank; of DTensors it is known). See docs/zero.md.
        paged: states beyond this budget of bytes on each device rest in host memory: a number, or
            a size such as "2GB"; True is 0 (docs/paging.md). Default: False, but of classes named
            for it.
        backend: None (default) picks one per device; or "cpu", "cuda", "triton" or
            "reference".
        seed: key of the random bits that stochastic formats draw, also per group (default 0).
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
"""Keywords of bitsandbytes, FlashOptim, torchao, optimi, apex and DeepSpeed; what does it here."""


def refuse(name: str, kind: str, known: set[str]) -> None:
    """Raises TypeError for a keyword that a class does not have, with what may have been meant."""
    hint = ELSEWHERE.get(name)
    if hint is not None:
        raise TypeError(f"{kind} has no keyword {name!r}; in onepass: {hint}")
    meant = did_you_mean(name, known, 0.6) or f". Its keywords: {', '.join(sorted(known))}"
    raise TypeError(f"{kind} has no keyword {name!r}{meant}")


_TORCH_KEYS: dict[type, frozenset[str]] = {}


def torch_keys(kind: type) -> frozenset[str]:
    """The keys that groups of torch.optim's class of the same name have; of a class that torch does
    not have, all that onepass keeps but the keywords of torch."""
    if kind not in _TORCH_KEYS:
        found = frozenset(("maximize", "decoupled_weight_decay"))
        for base in reversed(kind.__mro__):
            twin = getattr(torch.optim, base.__name__, None)
            if (
                twin is not None
                and base.__module__.startswith("onepass.optim.")
                and (base.__name__ != "Optimizer")
            ):
                param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
                found = frozenset(twin([param], lr=1e-3).param_groups[0])
        _TORCH_KEYS[kind] = found
    return _TORCH_KEYS[kind]


def describe(kind: type, defaults: dict[str, Any]) -> None:
    """Gives a class the signature of all its keywords, and a docstring that explains them.

    Args:
        kind: whose ``__init__`` takes ``**options: Unpack[Options]``.
        defaults: of the options.
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
