"""Models as lists of shapes: published models, transformers configurations, user modules."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...suggestions import did_you_mean
from . import from_transformers
from .families import FAMILIES
from .published import KNOWN, known
from .shapes import Model, Shape, of_module

__all__ = ["FAMILIES", "KNOWN", "Model", "Shape", "find", "known", "of_module"]


def find(name: str) -> Model:
    """The model with a name from the command line.

    The name is looked up, in this order, as a published model; as a file or folder with a
    transformers configuration; as ``module:factory``, which is called without arguments on the meta
    device; and as an ``owner/name`` in the Hugging Face hub cache.

    Raises:
        ValueError: no lookup succeeds, or the configuration is invalid; the message lists what is
            accepted.
    """
    if name.lower() in KNOWN:
        return known(name.lower())
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return of_config(path, name)
    if ":" in name and not name.startswith((".", "/")):
        return of_factory(name)
    cached = _cached(name)
    if cached is not None:
        return of_config(cached, name)
    meant = did_you_mean(name, KNOWN) or "."
    raise ValueError(
        f"no model {name!r}{meant} A model must be a name of --list-models, a transformers "
        "config.json or its folder, an owner/name in the cache of the Hugging Face hub, or "
        "module:factory"
    )


def of_config(path: Path, name: str) -> Model:
    """The model of a transformers configuration file.

    transformers builds the model on the meta device, where parameters take no memory. Without
    transformers, the families of :data:`FAMILIES` are supported.

    Raises:
        ValueError: the file is not a transformers configuration, the model type is unknown, or
            transformers is needed and is not installed.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{path} must be a transformers configuration, but is not JSON: {error}"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} must be a transformers configuration, but has no model_type")
    family = config["model_type"]
    why_not = from_transformers.missing()
    if not why_not:
        return from_transformers.of_transformers(config, name, str(path))
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: reading model_type {family!r} needs transformers ({why_not}): "
            f"pip install transformers{did_you_mean(family, FAMILIES) or '.'} Without it, onepass "
            f"reads {', '.join(FAMILIES)}; give any other model as module:factory"
        )
    try:
        shapes = tuple(FAMILIES[family](config))
    except KeyError as error:
        raise ValueError(f"{path}: a configuration of {family} needs {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a valid configuration of {family}: {error}") from error
    if any(type(n) is not int or n < 1 for shape in shapes for n in shape.shape):
        raise ValueError(
            f"{path} is not a valid configuration of {family}: sizes must be integers > 0"
        )
    return Model(name, shapes, str(path))


def of_factory(name: str) -> Model:
    """The model that ``module:factory`` makes on the meta device, where parameters take no memory.

    Raises:
        ValueError: there is no such factory, the factory raises an exception, or its result is not
            a torch.nn.Module.
    """
    made = load(name)
    try:
        with torch.device("meta"):
            model = made()
    except Exception as error:  # user code can raise anything
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module; got a {type(model).__name__}")
    lazy = [key for key, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{name}: parameter {lazy[0]!r} is lazy and has no shape yet: run the model once in "
            "the factory"
        )
    return of_module(model, name)


def load(name: str) -> Callable[..., Any]:
    """Imports the callable ``module:attribute``; modules in the working directory are also found.

    Raises:
        ValueError: the module cannot be imported, or the attribute is missing or not callable.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # user code can raise anything
        raise ValueError(
            f"{name}: {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            meant = did_you_mean(part, dir(found))
            raise ValueError(f"{name}: {module!r} has no {attribute!r}{meant}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} must be callable; got a {type(found).__name__}")
    return found


def _cached(name: str) -> Path | None:
    """The newest configuration of ``owner/name`` in the hub cache; None if there is none."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None
