"""The optimizers of the demo, each with a tuned learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

import onepass
from onepass_tools.demo.model import parameter_groups

Groups = list[dict[str, object]]
ADAM_BETAS = (0.9, 0.99)  # a short run needs a second moment with a shorter memory than 1,000 steps
LION_BETAS = (0.9, 0.99)
ADAM_LR = 3e-3


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its settings; `lr` is the peak of the schedule."""

    key: str
    label: str
    lr: float
    weight_decay: float
    make: Callable[[Groups, float], Optimizer]
    groups: Callable[[nn.Module, float], Groups] = parameter_groups

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over `model`, with decay on matrices but not on norms and biases."""
        return self.make(self.groups(model, self.weight_decay), self.lr)


def muon_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Return the matrices of the blocks, and the embeddings and vectors that AdamW steps."""
    matrices, rest = onepass.muon_groups(model)
    adamw = {"use_muon": False, "lr": ADAM_LR, "betas": ADAM_BETAS}
    embeddings = [p for p in rest["params"] if p.ndim >= 2]
    vectors = [p for p in rest["params"] if p.ndim < 2]
    return [
        {"params": matrices["params"], "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": weight_decay, **adamw},
        {"params": vectors, "weight_decay": 0.0, **adamw},
    ]


def torch_adamw_is_fused(device: torch.device) -> bool:
    """Return whether torch.optim.AdamW(fused=True) works on this device."""
    try:
        torch.optim.AdamW([torch.zeros(1, device=device)], fused=True)
    except RuntimeError:
        return False
    return True


def recipes(device: torch.device) -> list[Recipe]:
    """Return the recipes of the demo, in order; the demo compares the second with the first."""
    fused = torch_adamw_is_fused(device)
    return [
        Recipe(
            "torch-adamw",
            "torch AdamW, fused" if fused else "torch AdamW",
            3e-3,
            0.1,
            lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=fused),
        ),
        Recipe(
            "onepass-adamw",
            "onepass AdamW",
            3e-3,
            0.1,
            lambda groups, lr: onepass.AdamW(groups, lr=lr, betas=ADAM_BETAS),
        ),
        Recipe(
            "onepass-adamw-bf16",
            "onepass AdamW, bf16 states",
            3e-3,
            0.1,
            lambda groups, lr: onepass.AdamW(groups, lr=lr, betas=ADAM_BETAS, states="bf16"),
        ),
        Recipe(
            "onepass-lion",
            "onepass Lion",
            5e-4,
            0.5,
            lambda groups, lr: onepass.Lion(groups, lr=lr, betas=LION_BETAS),
        ),
        Recipe(
            "onepass-sgd",
            "onepass SGD, Nesterov",
            0.15,
            1e-4,
            lambda groups, lr: onepass.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
        ),
        Recipe(
            "onepass-muon",
            "onepass Muon",
            0.02,
            0.1,
            lambda groups, lr: onepass.Muon(groups, lr=lr),
            muon_groups,
        ),
    ]
