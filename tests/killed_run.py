"""A training run that a test kills."""

from __future__ import annotations

import hashlib
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onepass.training import Trainer

STEPS = 120


def train(path: Path | None, slow: Connection | None = None) -> Trainer:
    """Trains with dropout on shuffled data; continues from the checkpoint if it exists.

    Args:
        path: the checkpoint.
        slow: makes each step take 0.03 s, and gets a message when the training starts.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    x = torch.randn(80, 8)
    batches = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), 8, shuffle=True)
    trainer = Trainer(model, "adamw", 1e-2, states="mx8")
    if path is not None and path.exists():
        trainer.load(path)
    if slow is not None:
        inner = trainer.loss

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            time.sleep(0.03)
            return inner(output, target)

        trainer.loss = loss
        slow.send("training")
    epochs = STEPS // len(batches)
    trainer.fit(batches, epochs, checkpoint=path, save_every=None if path is None else 7)
    return trainer


def digest(trainer: Trainer) -> str:
    """SHA-256 of the weights, the optimizer states and the losses."""
    state = trainer.optimizer.state_dict()["state"]
    tensors = [*trainer.model.state_dict().values()]
    tensors += [value for key in sorted(state) for _, value in sorted(state[key].items())]
    found = hashlib.sha256(repr(trainer.losses).encode())
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def main(path: Path, slow: bool, pipe: Connection) -> None:
    """Trains in a process of its own, and sends the digest."""
    pipe.send(digest(train(path, pipe if slow else None)))
