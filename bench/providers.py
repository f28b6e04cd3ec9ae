"""The providers: onepass and the libraries that it is measured beside."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .cases import OPTIONS, Case

Make = Callable[[Any, list[torch.Tensor], Case], Any]
"""(the provider's module, parameters, case) -> an optimizer."""

# Forming 1 - beta2**t in fp32 costs up to 6e-5 of the first update; onepass and torch do it in
# float64, several others do not.
FP32_CORRECTION = 1e-4


@dataclass(frozen=True)
class Provider:
    """A library's optimizers.

    Attributes:
        name: as in the results.
        distribution: the package whose version is recorded.
        module: what is imported.
        rules: rule -> how to make its optimizer.
        formats: (dtype of the weights, format of the states) that it has.
        lists: whether it is also measured on lists of many tensors.
        slack: error allowed beyond rounding, as a fraction of the update.
        compared: states formats in whose cases it takes part for comparison, with formats of its
            own.
        dtype: of its weights in those cases, None for the case's own.
        bytes: that it moves per element in those cases.
        own_threads: it brings a pool of threads besides torch's.
        ours: a wrong result is a failure of the benchmark.
    """

    name: str
    distribution: str
    module: str
    rules: Mapping[str, Make]
    formats: frozenset[tuple[str, str]] = frozenset({("fp32", "fp32")})
    lists: bool = True
    slack: float = 0.0
    own_threads: bool = False
    ours: bool = False
    compared: frozenset[str] = frozenset()
    dtype: str | None = None
    bytes: float | None = None

    def unavailable(self) -> str:
        """Why it cannot be measured here; empty when it can."""
        return _load(self.distribution, self.module)[1]

    @property
    def version(self) -> str:
        """The installed version."""
        return importlib.metadata.version(self.distribution)

    def skips(self, case: Case) -> str:
        """Why it has no part in a case; empty when it has."""
        if case.rule not in self.rules:
            return f"has no {case.rule}" + (" of this kind" if self.module == "torch" else "")
        if case.states in self.compared:
            return ""
        if case.weights != "native" and not self.ours:
            return f"has no {case.weights} weights"
        if (case.dtype, case.states) not in self.formats:
            return f"has no {case.states} states for {case.dtype} weights"
        if not self.lists and len(case.list.shapes) > 1:
            return "measured on one tensor only"
        return ""

    def dtype_in(self, case: Case) -> str:
        """The dtype of its weights and gradients in a case."""
        return self.dtype if self.dtype and case.states in self.compared else case.dtype

    def bytes_in(self, case: Case) -> int:
        """Bytes that a step of it has to move in a case."""
        if self.bytes is None or case.states not in self.compared:
            return case.bytes
        return round(case.list.numel * self.bytes)

    def make(self, params: list[torch.Tensor], case: Case) -> Any:
        """A new optimizer over the parameters."""
        return self.rules[case.rule](_load(self.distribution, self.module)[0], params, case)


@cache
def _load(distribution: str, module: str) -> tuple[Any, str]:
    """(the module, why it could not be imported)."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, "not installed"
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a peer may fail in any way; the others are still measured
        return None, f"does not import: {type(error).__name__}: {error}".splitlines()[0]


def _named(name: str, **fixed: Any) -> Make:
    """The class of this name with the options of the case's rule."""

    def make(module: Any, params: list[torch.Tensor], case: Case) -> Any:
        return getattr(module, name)(params, **OPTIONS[case.rule], **fixed)

    return make


def _onepass(name: str) -> Make:
    def make(module: Any, params: list[torch.Tensor], case: Case) -> Any:
        options = OPTIONS[case.rule]
        formats = {"states": case.states, "weights": case.weights}
        return getattr(module, name)(params, **options, **formats, backend="cpu")

    return make


def _deepspeed_adam(module: Any, params: list[torch.Tensor], case: Case) -> Any:
    wide = case.states == "fp32"
    options = OPTIONS[case.rule]
    return module.adam.DeepSpeedCPUAdam(
        params, **options, adamw_mode=True, fp32_optimizer_states=wide
    )


def _deepspeed_lion(module: Any, params: list[torch.Tensor], case: Case) -> Any:
    lion = importlib.import_module("deepspeed.ops.lion")
    return lion.DeepSpeedCPULion(params, **OPTIONS[case.rule])


def _deepspeed_adagrad(module: Any, params: list[torch.Tensor], case: Case) -> Any:
    adagrad = importlib.import_module("deepspeed.ops.adagrad")
    return adagrad.DeepSpeedCPUAdagrad(params, **OPTIONS[case.rule])


# torch's states have the dtype of the weights.
_AS_WEIGHTS = frozenset({("fp32", "fp32"), ("bf16", "bf16")})
_EVERY = _AS_WEIGHTS | {("bf16", "fp32")}
_BLOCKS = frozenset({"mx8", "mx4", "dynamic8"})
_OURS = _EVERY | {(dtype, states) for dtype in ("fp32", "bf16") for states in _BLOCKS}
_TORCH_NAMES = {"adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}


def _torch(kind: str, rules: list[str], **fixed: Any) -> Provider:
    makers = {rule: _named(_TORCH_NAMES[rule], **fixed) for rule in rules}
    return Provider(f"torch-{kind}", "torch", "torch.optim", makers, _AS_WEIGHTS)


PROVIDERS = [
    Provider(
        "onepass-cpu",
        "onepass",
        "onepass",
        {rule: _onepass(name) for rule, name in {**_TORCH_NAMES, "lion": "Lion"}.items()},
        _OURS,
        ours=True,
    ),
    # What states in blocks are measured against: the fp32 step, and the 8 bits of others.
    Provider(
        "torch-fused-fp32",
        "torch",
        "torch.optim",
        {"adamw": _named("AdamW", fused=True)},
        frozenset(),
        compared=_BLOCKS,
        dtype="fp32",
        bytes=28,
    ),
    Provider(
        "bitsandbytes-8bit",
        "bitsandbytes",
        "bitsandbytes.optim",
        {"adamw": _named("AdamW8bit")},
        frozenset(),
        slack=FP32_CORRECTION,
        compared=_BLOCKS,
    ),
    _torch("fused", ["adamw", "sgd", "adagrad"], fused=True),
    _torch("foreach", list(_TORCH_NAMES), foreach=True),
    _torch("forloop", list(_TORCH_NAMES), foreach=False),
    Provider(
        "deepspeed-cpu",
        "deepspeed",
        "deepspeed.ops",
        {"adamw": _deepspeed_adam, "lion": _deepspeed_lion, "adagrad": _deepspeed_adagrad},
        _EVERY,
        slack=FP32_CORRECTION,
        own_threads=True,
    ),
    Provider(
        "optimi",
        "torch-optimi",
        "optimi",
        {"adamw": _named("AdamW"), "lion": _named("Lion"), "sgd": _named("SGD")},
        lists=False,
    ),
    Provider("lion-pytorch", "lion-pytorch", "lion_pytorch", {"lion": _named("Lion")}, lists=False),
    Provider(
        "bitsandbytes",
        "bitsandbytes",
        "bitsandbytes.optim",
        {
            "adamw": _named("AdamW32bit"),
            "lion": _named("Lion32bit"),
            "sgd": _named("SGD32bit"),
            "adagrad": _named("Adagrad32bit"),
            "rmsprop": _named("RMSprop32bit"),
        },
        lists=False,
        slack=FP32_CORRECTION,
    ),
    # The one of its classes that keeps fp32 states: the same step, compiled by torch.compile.
    Provider(
        "torchao",
        "torchao",
        "torchao.optim",
        {"adamw": _named("_AdamW")},
        lists=False,
        slack=FP32_CORRECTION,
    ),
]
