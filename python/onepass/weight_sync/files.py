"""Patches as safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .delta import Change, Delta

_FORMAT = "onepass.delta.1"
_POSITIONS, _VALUES = ".positions", ".values"


def _safetensors() -> Any:
    """The module safetensors.

    Raises:
        ImportError: it is not installed; the message has the pip command.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "deltas are stored as safetensors files: pip install safetensors"
        ) from error
    return safetensors


def save_delta(delta: Delta, path: str | os.PathLike[str]) -> None:
    """Writes a patch as a safetensors file.

    ``<name>.values`` has the new weights of a parameter and ``<name>.positions`` their positions,
    which is absent if the values are all weights. Everything else is JSON in the metadata entry
    ``delta``. The file is written under another name and then renamed, so that a reader never sees
    a part of it.

    Args:
        delta: a patch on any device; it is only read.
        path: the file; its folder must exist.

    Raises:
        ImportError: safetensors is not installed.
    """
    tensors = {}
    for name, change in delta.changes.items():
        # Copies, because the changes of several parameters are views of one tensor.
        tensors[name + _VALUES] = change.values.detach().cpu().clone()
        if change.positions is not None:
            tensors[name + _POSITIONS] = change.positions.cpu().clone()
    header = {
        "format": _FORMAT,
        "id": delta.id,
        "predecessor": delta.predecessor,
        "checksums": {name: f"{value:016x}" for name, value in delta.checksums.items()},
        "tied": dict(delta.tied),
        "parts": sorted(delta.parts),
        "ranks": delta.ranks,
        "shapes": {name: list(change.shape) for name, change in delta.changes.items()},
    }
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        metadata = {"delta": json.dumps(header)}
        _safetensors().torch.save_file(tensors, str(partial), metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_delta(path: str | os.PathLike[str], device: str = "cpu") -> Delta:
    """Reads a patch that :func:`save_delta` wrote.

    Args:
        path: the file.
        device: device of the tensors.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is not a patch, or its contents do not fit together.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt", device=device) as file:
            header = json.loads((file.metadata() or {}).get("delta", "{}"))
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a delta of this version of onepass ({_FORMAT})")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _delta(header, tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a delta: {type(error).__name__}: {error}") from error


def _delta(header: dict[str, Any], tensors: dict[str, Any]) -> Delta:
    """The patch of a file's metadata and tensors, after checks."""
    changes = {}
    for name, shape in header["shapes"].items():
        change = Change(
            tuple(map(int, shape)), tensors.get(name + _POSITIONS), tensors[name + _VALUES]
        )
        change.check(name)
        changes[name] = change
    for second, first in header["tied"].items():
        if first not in changes:
            raise ValueError(f"{second} is tied to {first}, which the delta does not have")
    return Delta(
        changes,
        str(header["id"]),
        str(header["predecessor"]),
        {name: int(value, 16) for name, value in header["checksums"].items()},
        dict(header["tied"]),
        frozenset(map(int, header["parts"])),
        int(header["ranks"]),
    )
