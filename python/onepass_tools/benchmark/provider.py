"""A provider: the optimizers of one library, or of one backend of onepass, as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.integrations.other_libraries import TORCH, Library, OptimizerClass

from .cases import DTYPES, OPTIONS, Case, bytes_moved

Make = Callable[[list[torch.Tensor], Case, str], Any]
"""(parameters, case, device type) -> an optimizer."""

CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
ONE_EACH = {"cpu": 1, "cuda": 300}  # a call, or several, for each tensor
COMPILED = {"cpu": 1, "cuda": 50}  # minutes of compilation on a list of hundreds
EVERYWHERE = CPU | CUDA
# Forming 1 - beta2**t in fp32 costs up to 6e-5 of the first update; onepass and torch do it in
# float64, unless torch compiles its step or runs its fused one on a GPU; several others do not.
FP32_CORRECTION = 1e-4
AS_WEIGHTS = frozenset({(name, name) for name in DTYPES})  # states have the dtype of the weights
BLOCKS = frozenset(name for name, form in STATE_FORMATS.items() if form.block > 1)


@dataclass(frozen=True)
class Provider:
    """A library's optimizers.

    Attributes:
        name: as in the results.
        library: where its classes are; its version is recorded.
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

    def unavailable(self, device: str = "cpu") -> str:
        """Why it cannot be measured on a device here; empty when it can."""
        if device not in self.devices:
            return f"not for {device}"
        if not self.ours:
            return self.library.unavailable()
        from onepass.engine.backends import BACKENDS

        return BACKENDS[self.name.removeprefix("onepass-")].unavailable(torch.device(device))

    @property
    def version(self) -> str:
        """The installed version; "source" for ours where it is not installed."""
        return self.library.version or "source"

    def skips(self, case: Case, device: str = "cpu") -> str:
        """Why it has no part in a case; empty when it has."""
        if device not in self.devices:
            return f"not for {device}"
        if case.rule not in self.rules:
            return f"has no {case.rule}" + (" of this kind" if self.library == TORCH else "")
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
        return self.rules[case.rule](params, case, device)

    def step(
        self, params: list[torch.Tensor], case: Case, device: str = "cpu"
    ) -> Callable[[], Any]:
        """Takes a step of a new optimizer over the parameters."""
        optimizer = self.make(params, case, device)
        if not self.compiled:
            return optimizer.step  # type: ignore[no-any-return]
        torch._dynamo.reset()  # of the case before
        return torch.compile(optimizer.step)  # type: ignore[no-any-return]


def made(by: OptimizerClass, **fixed: Any) -> Make:
    """An optimizer of this class, with the options of the case's rule."""

    def make(params: list[torch.Tensor], case: Case, device: str) -> Any:
        return by.make(params, **OPTIONS[case.rule], **fixed)

    return make
