"""Files that are whole or not there, and everything random that a run has used."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_atomically(content: object, path: str | os.PathLike[str]) -> None:
    """Saves by torch.save under a temporary name beside ``path``, then renames it.

    Whenever the process is killed, ``path`` holds the last checkpoint or the new one, whole; what
    is left of a temporary file is overwritten by the next.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, as torch.load takes them unpickled."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    algorithm, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` took; GPUs by their number, those that are here."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a DataLoader, its sampler or its batch sampler has."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(owner, "sampler", None) for owner in (loader, batch_sampler)]
    owners = (loader, batch_sampler, *samplers)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def check_fits(model: torch.nn.Module, saved: dict[str, torch.Tensor], path: object) -> None:
    """Raises ValueError, before anything is changed, if weights are of another model."""
    ours = {name: tuple(value.shape) for name, value in _tensors(model.state_dict())}
    theirs = {name: tuple(value.shape) for name, value in _tensors(saved)}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path} is of another model: {name!r} has shape {theirs.get(name, 'none')} there "
                f"and {ours.get(name, 'none')} in this one"
            )


def _tensors(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)]
