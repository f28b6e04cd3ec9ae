"""Checkpoint files: atomic writes, validation on load, and the states of random generators."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSION = 1  # version of the files that Trainer.save() writes

CONTENT: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "scheduler": dict,
    "scaler": dict,
    "losses": list,
    "epoch": int,
    "random": dict,
    "position": (dict, type(None)),
}
"""The entries of a version-1 checkpoint besides its version, with their types."""


def save_atomically(content: object, path: str | os.PathLike[str]) -> None:
    """Saves with torch.save to a temporary file beside ``path``, then renames the file.

    If the process is killed at any time, ``path`` contains either the complete previous checkpoint
    or the complete new one. The next save overwrites a leftover temporary file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def rng_state() -> dict[str, Any]:
    """The RNG states of Python, NumPy and torch, in types that weights_only=True can load."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    algorithm, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the states from :func:`rng_state`; states of GPUs that do not exist are ignored."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators that belong to a DataLoader, its sampler or its batch sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(owner, "sampler", None) for owner in (loader, batch_sampler)]
    owners = (loader, batch_sampler, *samplers)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def read_checkpoint(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """Reads a file written by Trainer.save(), with its tensors on ``device``.

    Raises:
        ValueError: the file is not such a file, is damaged, or has another version.
        FileNotFoundError: the file does not exist.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    # torch.load can raise almost any exception for a file of arbitrary bytes.
    except Exception as error:
        # torch's message may advise weights_only=False, which runs code from the file.
        raise ValueError(
            f"{path} must be a file that Trainer.save() or Trainer.fit() wrote; it is damaged or "
            f"not such a file: torch.load cannot read it ({type(error).__name__})"
        ) from error
    if not isinstance(saved, dict) or "version" not in saved:
        missing = " without a version" if isinstance(saved, dict) else ""
        raise ValueError(
            f"{path} must be a file that Trainer.save() or Trainer.fit() wrote; it holds an object "
            f"of type {type(saved).__name__}{missing}"
        )
    if saved["version"] != VERSION:
        raise ValueError(
            f"{path} has version {saved['version']}; this version of onepass reads version "
            f"{VERSION}"
        )
    wrong = [key for key, kind in CONTENT.items() if not isinstance(saved.get(key, ...), kind)]
    if wrong:
        raise ValueError(
            f"{path} must be a file that Trainer.save() or Trainer.fit() wrote; it has no valid "
            f"{', '.join(wrong)}"
        )
    return saved


def check_checkpoint(
    model: torch.nn.Module, scheduler: Any, scaler: Any, saved: dict[str, Any], path: object
) -> None:
    """Raises ValueError unless a checkpoint matches these objects. Changes nothing.

    The load_state_dict of the optimizer checks the optimizer's part.
    """
    check_fits(model, saved["model"], path)
    ours, theirs = _schedule_keys(scheduler.state_dict()), _schedule_keys(saved["scheduler"])
    if ours != theirs:
        raise ValueError(
            f"{path} was saved with another schedule: use the schedule and warmup_steps of the "
            "Trainer that saved it"
        )
    if scaler.is_enabled() and not saved["scaler"]:
        raise ValueError(
            f"{path} has no loss scale, which amp=torch.float16 needs: it was saved by a Trainer "
            "with another value of amp"
        )


def _schedule_keys(state: dict[str, Any]) -> tuple[Any, ...]:
    """The keys of a scheduler's state, including the states of nested schedulers."""
    inner = state.get("_schedulers") or ()
    return tuple(sorted(state)), *map(_schedule_keys, inner)


def check_fits(model: torch.nn.Module, saved: dict[str, torch.Tensor], path: object) -> None:
    """Raises ValueError if the weights are from another model. Changes nothing."""
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
