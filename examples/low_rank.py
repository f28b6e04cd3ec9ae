"""Fine-tunes low-rank additions to frozen layers (LoRA) with 8-bit, paged optimizer states.

Source: Hu et al., "LoRA: low-rank adaptation of large language models" (2022). Paged states are
those of Dettmers et al., "QLoRA" (2023).
"""

import torch
from torch import nn

from onepass.training import Trainer


class LowRank(nn.Module):
    """A frozen linear layer plus ``up @ down``, of rank ``rank``; ``up`` starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the frozen layer plus that of the low-rank addition."""
        return self.layer(x) + x @ self.down.T @ self.up.T


torch.manual_seed(0)
size = 64
base = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, size))
# The task: learn a change of rank two in the last layer of the base model.
x = torch.randn(512, size)
with torch.no_grad():
    change = torch.randn(size, 2) @ torch.randn(2, 128) / 128**0.5
    target = base(x) + base[:2](x) @ change.T

tuned = nn.Sequential(LowRank(base[0]), base[1], LowRank(base[2]))
frozen = [p.clone() for p in tuned.parameters() if not p.requires_grad]

# Paged states are kept in host memory, for GPUs that do not have enough memory for them.
trainer = Trainer(tuned, "pagedadamw8bit", lr=1e-2, schedule="constant")
for _ in range(400):
    trainer.train_step(x, target)

assert all(
    map(torch.equal, frozen, (p for p in tuned.parameters() if not p.requires_grad))
)  # the frozen layers have not changed
count = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
print(f"{count:,} of {sum(p.numel() for p in tuned.parameters()):,} parameters trained")
print(f"loss {trainer.losses[0]:.4f} at first")
print(f"loss {trainer.losses[-1]:.4f}")
