"""The optimizer configurations that ``python -m bench.pretrain`` compares."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import onepass
from onepass.training import decay_groups
from onepass_tools.benchmark.devices import Device
from onepass_tools.benchmark.provider import Provider
from onepass_tools.benchmark.providers import all_providers, find
from onepass_tools.demo.model import GPT
from onepass_tools.demo.train import Task

from .results import Line

LR = 6e-4  # GPT-3's for 125 M parameters (Brown et al., 2020), with its betas
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1  # on matrices and embeddings; none on biases and norms


@dataclass(frozen=True)
class Config:
    """An AdamW optimizer and its formats.

    Attributes:
        name: the name for ``--configs`` and in the result lines.
        library: torch, onepass or bitsandbytes.
        dtype: dtype of the model's weights, fp32 or bf16; norms stay in fp32.
        weights: weight format of onepass. ``split8`` stores 8 more bits of each bf16 weight in the
            optimizer. ``stochastic`` rounds each update to one of the two nearest bf16 values at
            random, so that the mean is exact.
        states: format of the two moments.
    """

    name: str
    library: str
    dtype: str
    weights: str
    states: str

    @property
    def label(self) -> str:
        """The configuration in words."""
        kind = {"torch": "torch fused AdamW", "bitsandbytes": "bitsandbytes AdamW8bit"}.get(
            self.library, "onepass AdamW"
        )
        how = "" if self.weights == "native" else f" {self.weights}"
        return f"{kind}, {self.dtype}{how} weights, {self.states} states"

    def settings(self) -> Line:
        """The fields of the configuration that determine a result."""
        return asdict(self)

    def unavailable(self, device: Device) -> str:
        """Why it cannot be measured on the device; empty if it can."""
        if self.library == "onepass" and self._backend(device) == "reference":
            return "only the slow reference backend is available: `onepass info` prints the reason"
        return self._provider(device).unavailable(device.type)

    def provider(self, device: Device) -> Line:
        """The provider fields of a result line: library (for onepass, with backend), version."""
        found = self._provider(device)
        return {"provider": found.name, "provider_version": found.version}

    def model(self, task: Task) -> GPT:
        """The task's model with weights of this configuration's dtype.

        Under autocast, a model with bf16 weights computes the same as a model with these values in
        fp32: the residual stream stays in fp32, as with an fp32 embedding.
        """
        model = task.model()
        if self.dtype == "bf16":
            onepass.cast_model(model)
            model.tokens.register_forward_hook(lambda module, inputs, output: output.float())
        return model

    def optimizer(self, model: nn.Module, seed: int) -> torch.optim.Optimizer:
        """The optimizer for the model; the seed is that of stochastic rounding."""
        options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS}
        if self.dtype == "bf16":
            # The formats apply to everything except norms, so also to embeddings.
            groups = decay_groups(model, WEIGHT_DECAY, fp32_states=onepass.NORMS)
        else:
            groups = decay_groups(model, WEIGHT_DECAY)
        if self.library == "torch":
            return torch.optim.AdamW(groups, **options, fused=True)
        if self.library == "bitsandbytes":
            made: torch.optim.Optimizer
            made = importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, **options)
            return made
        options |= {"weights": self.weights, "states": self.states, "seed": seed}
        return onepass.AdamW(groups, **options)

    @staticmethod
    def _backend(device: Device) -> str:
        return onepass.backends.choose(torch.device(device.type)).name

    def _provider(self, device: Device) -> Provider:
        """The provider of the same library in ``python -m bench``."""
        names = {"torch": "torch-fused", "bitsandbytes": "bitsandbytes-8bit"}
        name = names.get(self.library) or f"onepass-{self._backend(device)}"
        return find(all_providers(device.type), name)[0]


CONFIGS = (
    Config("torch-fused", "torch", "fp32", "native", "fp32"),
    Config("onepass-fp32", "onepass", "fp32", "native", "fp32"),
    Config("onepass-split8-mx8", "onepass", "bf16", "split8", "mx8"),
    Config("onepass-stochastic-mx4", "onepass", "bf16", "stochastic", "mx4"),
    Config("bitsandbytes-8bit", "bitsandbytes", "fp32", "native", "8-bit"),
)
BASELINE = CONFIGS[0].name
