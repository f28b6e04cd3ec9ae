"""A provider: the optimizers of one library, or of one onepass backend, in the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.integrations.other_libraries import TORCH, Library, OptimizerClass

from .cases import DTYPES, OPTIONS, Case, bytes_moved, class_of, state_count

Make = Callable[[list[torch.Tensor], Case, str], Any]
"""(parameters, case, device type) -> an optimizer."""

CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
ONE_EACH = {"cpu": 1, "cuda": 300}  # for steps that make one or more calls per tensor
COMPILED = {"cpu": 1, "cuda": 50}  # hundreds of tensors take minutes to compile
EVERYWHERE = CPU | CUDA
# Computing 1 - beta2**t in fp32 causes a relative error of up to 6e-5 in the first update. onepass
# uses float64. torch uses float64 except in its compiled step and its fused step on a GPU. Several
# other libraries use fp32.
FP32_CORRECTION = 1e-4
AS_WEIGHTS = frozenset({(name, name) for name in DTYPES})  # states with the dtype of the weights
BLOCKS = frozenset(name for name, form in STATE_FORMATS.items() if form.block > 1)


@dataclass(frozen=True)
class Provider:
    """The optimizers of one library or onepass backend.

    Attributes:
        name: the name in the results.
        library: the library of the classes; the results record its version.
        rules: rule -> a function that makes the optimizer; not used by a backend of onepass.
        devices: the supported device types.
        formats: the supported pairs (dtype of the weights, format of the states).
        kept: the supported weight formats besides native, by their onepass names.
        most_tensors: device type -> the largest measured number of tensors. The provider is not
            measured on longer lists, because it compiles or launches once per tensor.
        slack: the allowed error beyond rounding, as a fraction of the update.
        compared: state formats for whose cases the provider is measured as a comparison, although
            its own formats differ.
        dtype: the dtype of the provider's weights in those cases; None for the dtype of the case.
        state_bytes: bytes per state value of the provider in those cases.
        own_threads: whether the provider has a thread pool besides torch's.
        compiled: whether torch.compile compiles the step.
        ours: whether a wrong result is a failure of the benchmark.
        backend: the backend of onepass, which serves every rule that it does not lack; empty for
            other libraries.
    """

    name: str
    library: Library
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
    backend: str = ""

    def unavailable(self, device: str = "cpu") -> str:
        """The reason why the provider cannot be measured on a device here; empty if it can."""
        if device not in self.devices:
            return f"does not support {device}"
        if not self.backend:
            return self.library.unavailable()
        from onepass.engine.backends import BACKENDS

        return BACKENDS[self.backend].unavailable(torch.device(device))

    @property
    def version(self) -> str:
        """The installed version, or "source" if the package is not installed."""
        return self.library.version or "source"

    def skips(self, case: Case, device: str = "cpu") -> str:
        """The reason why the provider does not support a case; empty if it does."""
        if device not in self.devices:
            return f"does not support {device}"
        if self.backend:
            from onepass.engine.backends import BACKENDS

            if lacks := BACKENDS[self.backend].lacks(class_of(case.rule).rule):
                return lacks
        elif case.rule not in self.rules:
            return f"has no {case.rule}" + (" of this kind" if self.library == TORCH else "")
        most = (self.most_tensors or {}).get(device)
        if most is not None and len(case.list.shapes) > most:
            return f"is measured only on lists of up to {most} tensors"
        if case.states in self.compared:
            return ""
        if case.weights != "native" and not self.ours and case.weights not in self.kept:
            return f"has no {case.weights} weights"
        if not self.ours and (case.dtype, case.states) not in self.formats:
            return f"has no {case.states} states for {case.dtype} weights"
        return ""

    def dtype_in(self, case: Case) -> str:
        """The dtype of the provider's weights and gradients in a case."""
        return self.dtype if self.dtype and case.states in self.compared else case.dtype

    def bytes_in(self, case: Case) -> int:
        """Bytes that a step of the provider must read and write in a case."""
        if case.states not in self.compared:
            return case.bytes
        dtype = DTYPES[self.dtype_in(case)]
        extra = WEIGHT_FORMATS[case.weights].bytes(dtype) if case.weights in self.kept else 0
        moved = bytes_moved(dtype.itemsize, extra, state_count(case.rule) * self.state_bytes)
        return round(case.list.numel * moved)

    def make(self, params: list[torch.Tensor], case: Case, device: str = "cpu") -> Any:
        """Makes a new optimizer over the parameters."""
        if self.backend:
            options: dict[str, Any] = {**OPTIONS[case.rule], "backend": self.backend}
            options |= {"states": case.states, "weights": case.weights}
            return class_of(case.rule)(params, **options)
        return self.rules[case.rule](params, case, device)

    def step(
        self, params: list[torch.Tensor], case: Case, device: str = "cpu"
    ) -> Callable[[], Any]:
        """Returns a function that takes a step of a new optimizer over the parameters."""
        optimizer = self.make(params, case, device)
        if not self.compiled:
            return optimizer.step  # type: ignore[no-any-return]
        torch._dynamo.reset()  # discard the graphs of the previous case
        return torch.compile(optimizer.step)  # type: ignore[no-any-return]


def made(by: OptimizerClass, **fixed: Any) -> Make:
    """Returns a function that makes an optimizer of a class with the options of the case's rule."""

    def make(params: list[torch.Tensor], case: Case, device: str) -> Any:
        return by.make(params, **OPTIONS[case.rule], **fixed)

    return make
