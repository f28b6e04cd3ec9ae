"""The keyword-only options, for the type checker and the reader of a signature."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict  # torch's own dependency

from ..paging.options import Paging


class Options(TypedDict, total=False):
    """The keyword-only options that every class takes.

    Attributes:
        maximize: ascend instead of descend (default False).
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
    decoupled_weight_decay: bool | None
    states: str | None
    weights: str
    paged: bool | int | str | Paging | None
    max_grad_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    zero_grads: bool
    ema_decay: float | None
    telemetry: bool
    norm_group: Any
    backend: str | None
    seed: int
