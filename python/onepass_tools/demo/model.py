"""A small byte-level GPT with pre-norm blocks, learned positions and a tied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte


@dataclass(frozen=True)
class Shape:
    """The size of the model. `context` is in bytes; `width` is a multiple of `heads`."""

    context: int
    width: int
    depth: int
    heads: int


class Block(nn.Module):
    """One transformer block: causal attention, then a feed-forward layer four times as wide."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.mlp_in = nn.Linear(shape.width, 4 * shape.width)
        self.mlp_out = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        out: Tensor = x + self.mlp_out(hidden)
        return out


class GPT(nn.Module):
    """A decoder over bytes; `forward` returns the mean loss in nats per byte."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                # GPT-2 scales the 2 * depth layers that add to the residual stream.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                scale = (2 * shape.depth) ** -0.5 if residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of `targets` given `inputs`, both int64 (batch, length)."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameter elements, with shared parameters counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the parameters into two groups: matrices with decay, norms and biases without decay."""
    parameters: list[Tensor] = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def initial_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Return the initial state dict of every run, on the CPU."""
    torch.manual_seed(seed)
    return GPT(shape).state_dict()
