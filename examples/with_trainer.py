"""Uses onepass's Trainer: mini-batches, checkpoints, and resuming from a checkpoint."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from onepass.training import Trainer, loader


def trainer() -> Trainer:
    """A new Trainer with a new model; every call returns the same initial weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1))
    return Trainer(
        model,
        "adamw",
        lr=1e-2,
        schedule="cosine",
        schedule_options={"total_steps": 320},
        states="bf16",
    )


generator = torch.Generator().manual_seed(1)
x = torch.rand(2048, 2, generator=generator) * 4 - 2
data = TensorDataset(x, torch.sin(x[:, :1] * x[:, 1:]))
path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "run.pt"

# This run ends after two of ten epochs and writes a checkpoint.
trainer().fit(loader(data, batch_size=64), epochs=2, checkpoint=path)

# This run loads the checkpoint and continues with the third epoch.
resumed = trainer()
resumed.load(path)
resumed.fit(loader(data, batch_size=64), epochs=10, checkpoint=path, save_every=50)
print(f"{len(resumed.losses)} steps in total")
print(f"loss {resumed.evaluate(loader(data, batch_size=None)):.4f}")
