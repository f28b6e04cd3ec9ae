"""The providers: onepass and the libraries that it is measured beside."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import CLASSES, DTYPES, OPTIONS, Case, bytes_moved

Make = Callable[[Any, list[torch.Tensor], Case, str], Any]
"""(the provider's module, parameters, case, device type) -> an optimizer."""

CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
ONE_EACH = {"cpu": 1, "cuda": 300}  # a call, or several, for each tensor
COMPILED = {"cpu": 1, "cuda": 50}  # minutes of compilation on a list of hundreds
EVERYWHERE = CPU | CUDA
# Forming 1 - beta2**t in fp32 costs up to 6e-5 of the first update; onepass and torch do it in
# float64, unless torch compiles its step or runs its fused one on a GPU; several others do not.
FP32_CORRECTION = 1e-4


@dataclass(frozen=True)
class Provider:
    """A library's optimizers.

    Attributes:
        name: as in the results.
        distribution: the package whose version is recorded.
        module: what is imported.
        rules: rule -> how to make its optimizer.
        devices: types of devices that it serves.
        formats: (dtype of the weights, format of the states) that it has.
        kept: formats of weights that it has besides native ones; the key is ours.
        most_tensors: by device type; on lists of more it is not measured, for it compiles or
            launches once for each.
        slack: error allowed beyond rounding, as a fraction of the update.
        compared: states formats in whose cases it takes part for comparison, with formats of its
            own.
        dtype: of its weights in those cases, None for the case's own.
        state_bytes: of one value of its states in those cases.
        own_threads: it brings a pool of threads besides torch's.
        compiled: its step is compiled by torch.compile.
        ours: a wrong result is a failure of the benchmark.
    """

    name: str
    distribution: str
    module: str
    rules: Mapping[str, Make]
    devices: frozenset[str] = EVERYWHERE
    formats: frozenset[tuple[str, str]] = frozenset({("fp32", "fp32")})
    kept: frozenset[str] = frozenset()
    most_tensors: Mapping[str, int] | None = None
    slack: float = 0.0
    own_threads: bool = False
    compiled: bool = False
    ours: bool = False
    compared: frozenset[str] = frozenset()
    dtype: str | None = None
    state_bytes: float = 0.0

    def unavailable(self, device: str = "cpu") -> str:
        """Why it cannot be measured on a device here; empty when it can."""
        if device not in self.devices:
            return f"not for {device}"
        if why := _load(self.distribution, self.module)[1]:
            return why
        if not self.ours:
            return ""
        from onepass.engine.backends import BACKENDS

        return BACKENDS[self.name.removeprefix("onepass-")].unavailable(torch.device(device))

    @property
    def version(self) -> str:
        """The installed version; "source" for ours where it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "source"

    def skips(self, case: Case, device: str = "cpu") -> str:
        """Why it has no part in a case; empty when it has."""
        if device not in self.devices:
            return f"not for {device}"
        if case.rule not in self.rules:
            return f"has no {case.rule}" + (" of this kind" if self.module == "torch.optim" else "")
        most = (self.most_tensors or {}).get(device)
        if most is not None and len(case.list.shapes) > most:
            return f"measured on lists of up to {most}"
        if case.states in self.compared:
            return ""
        if case.weights != "native" and not self.ours and case.weights not in self.kept:
            return f"has no {case.weights} weights"
        if not self.ours and (case.dtype, case.states) not in self.formats:
            return f"has no {case.states} states for {case.dtype} weights"
        return ""

    def dtype_in(self, case: Case) -> str:
        """The dtype of its weights and gradients in a case."""
        return self.dtype if self.dtype and case.states in self.compared else case.dtype

    def bytes_in(self, case: Case) -> int:
        """Bytes that a step of it has to move in a case."""
        if case.states not in self.compared:
            return case.bytes
        dtype = DTYPES[self.dtype_in(case)]
        extra = WEIGHT_FORMATS[case.weights].bytes(dtype) if case.weights in self.kept else 0
        moved = bytes_moved(case.rule, dtype.itemsize, extra, self.state_bytes)
        return round(case.list.numel * moved)

    def make(self, params: list[torch.Tensor], case: Case, device: str = "cpu") -> Any:
        """A new optimizer over the parameters."""
        module = _load(self.distribution, self.module)[0]
        return self.rules[case.rule](module, params, case, device)

    def step(
        self, params: list[torch.Tensor], case: Case, device: str = "cpu"
    ) -> Callable[[], Any]:
        """Takes a step of a new optimizer over the parameters."""
        optimizer = self.make(params, case, device)
        if not self.compiled:
            return optimizer.step  # type: ignore[no-any-return]
        torch._dynamo.reset()  # of the case before
        return torch.compile(optimizer.step)  # type: ignore[no-any-return]


@cache
def _load(distribution: str, module: str) -> tuple[Any, str]:
    """(the module, why it could not be imported)."""
    try:
        if distribution != "onepass":  # ours may be run from its sources
            importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, "not installed"
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a peer may fail in any way; the others are still measured
        return None, f"does not import: {type(error).__name__}: {error}".splitlines()[0]


def named(name: str, **fixed: Any) -> Make:
    """The class of this name with the options of the case's rule."""

    def make(module: Any, params: list[torch.Tensor], case: Case, device: str) -> Any:
        return getattr(module, name)(params, **OPTIONS[case.rule], **fixed)

    return make


def _onepass(backend: str) -> Provider:
    def of(name: str) -> Make:
        def make(module: Any, params: list[torch.Tensor], case: Case, device: str) -> Any:
            formats = {"states": case.states, "weights": case.weights}
            options = OPTIONS[case.rule]
            return getattr(module, name)(params, **options, **formats, backend=backend)

        return make

    rules = {rule: of(name) for rule, name in CLASSES.items()}
    devices = CPU if backend == "cpu" else CUDA
    return Provider(f"onepass-{backend}", "onepass", "onepass", rules, devices, ours=True)


# torch's states have the dtype of the weights.
AS_WEIGHTS = frozenset({(name, name) for name in DTYPES})
BLOCKS = frozenset(name for name, form in STATE_FORMATS.items() if form.block > 1)


def _torch(kind: str, rules: list[str], **fixed: Any) -> Provider:
    options = {"most_tensors": fixed.pop("most_tensors", None)}
    options["compiled"] = fixed.pop("compiled", False)
    options["devices"] = fixed.pop("devices", EVERYWHERE)
    # The CUDA kernel forms it in fp32 as well.
    single = options["compiled"] or (options["devices"] == CUDA and "fused" in fixed)
    options["slack"] = FP32_CORRECTION if single else 0.0
    makers = {rule: named(CLASSES[rule], **fixed) for rule in rules}
    name = f"torch-{kind}"
    return Provider(name, "torch", "torch.optim", makers, formats=AS_WEIGHTS, **options)


_OF_TORCH = [rule for rule in CLASSES if rule != "lion"]
OURS_AND_TORCH = [
    _onepass("cpu"),
    _onepass("cuda"),
    _onepass("triton"),
    # What states in blocks are measured against: the fp32 step, and the few bits of others.
    Provider(
        "torch-fused-fp32",
        "torch",
        "torch.optim",
        {"adamw": named("AdamW", fused=True)},
        formats=frozenset(),
        compared=BLOCKS,
        dtype="fp32",
        state_bytes=4,
    ),
    _torch("fused", ["adamw", "sgd", "adagrad"], fused=True, devices=CPU),
    _torch("fused", ["adamw", "sgd"], fused=True, devices=CUDA),
    _torch("foreach", _OF_TORCH, foreach=True),
    _torch("forloop", _OF_TORCH, foreach=False),
    _torch("compiled", _OF_TORCH, foreach=True, compiled=True, most_tensors=COMPILED),
]


def all_providers(device: str = "cpu") -> list[Provider]:
    """Every provider that serves a type of device, ours first, installed or not."""
    from .peers import PEERS

    return [p for p in (*OURS_AND_TORCH, *PEERS) if device in p.devices]


def find(providers: list[Provider], patterns: str | None) -> list[Provider]:
    """Those whose name matches one of the patterns, which commas separate; all for None.

    Raises:
        ValueError: a pattern that matches none; says what there is.
    """
    from fnmatch import fnmatch

    if patterns is None:
        return providers
    wanted = patterns.split(",")
    names = [provider.name for provider in providers]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no provider {pattern}; there are {', '.join(names)}")
    return [p for p in providers if any(fnmatch(p.name, pattern) for pattern in wanted)]
