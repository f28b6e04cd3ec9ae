"""Checks of arguments. Each error names the argument, its value and the accepted values."""

from __future__ import annotations

import numbers
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.option_checks import check_choice
from ..suggestions import did_you_mean


def check_name(argument: str, name: object, known: Collection[str], kind: str = "") -> None:
    """Raises ValueError unless ``name`` is one of ``known``; the message suggests similar names.

    Args:
        argument: the name of the argument, for the message.
        name: the value found.
        known: the accepted names.
        kind: text for the message about other accepted values; may be empty.
    """
    if isinstance(name, str) and name in known:
        return
    meant = did_you_mean(name, known)
    raise ValueError(f"{argument} must be {kind}one of {', '.join(known)}; got {name!r}{meant}")


def check_count(argument: str, value: object, least: int) -> None:
    """Raises unless ``value`` is an integer of at least ``least``.

    Raises:
        TypeError: the value is not an integer; True, False and 2.0 are not integers.
        ValueError: the integer is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an integer of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}; got {value}")


def check_share(argument: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number in [0, 1]; got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{argument} must be in [0, 1]; got {value}")


def check_callable(argument: str, value: object, what: str) -> None:
    """Raises TypeError unless ``value`` is callable; ``what`` describes it in the message."""
    if not callable(value):
        raise TypeError(f"{argument} must be {what}; got {value!r}")


def check_model(model: object) -> None:
    """Raises TypeError unless ``model`` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {model!r}")


def check_loader(loader: object) -> None:
    """Raises TypeError unless ``loader`` is iterable."""
    # As in DataLoader, an object that has only __getitem__ counts as iterable.
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader must be an iterable of pairs (data, target); got {loader!r}")


def check_options(argument: str, options: object, known: Collection[str]) -> None:
    """Raises unless ``options`` is None or a dictionary whose keys are all in ``known``.

    Raises:
        TypeError: the value is neither None nor a dictionary.
        ValueError: a key is unknown.
    """
    if options is None:
        return
    if not isinstance(options, dict):
        raise TypeError(f"{argument} must be None or a dictionary; got {options!r}")
    for key in options:
        check_name(f"each key of {argument}", key, known)


def check_formats(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a format is unknown, or if no trainable parameter supports ``weights``.

    The optimizer does not detect these errors if every group sets its own format, as groups from
    :func:`onepass.parameter_groups` can.
    """
    if options.get("states") is not None:
        check_choice("states", options["states"], STATE_FORMATS)
    weights = options.get("weights", "native")
    check_choice("weights", weights, WEIGHT_FORMATS)
    served = WEIGHT_FORMATS[weights].codes
    found = {p.dtype for p in model.parameters() if p.requires_grad}
    if found and not found & served.keys():
        need = " or ".join(map(_short, served))
        raise ValueError(
            f"weights={weights!r} needs a {need} parameter that requires a gradient; those of the "
            f"model are {', '.join(sorted(map(_short, found)))}: cast the model first, for example "
            "with onepass.cast_model, or leave weights out"
        )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def check_file(argument: str, path: Any) -> None:
    """Raises unless ``path`` is the path of an existing or new file in an existing folder.

    Raises:
        TypeError: the value is neither a string nor an os.PathLike.
        ValueError: the path is empty, or is the path of a folder.
        FileNotFoundError: the folder of the file does not exist.
    """
    if isinstance(path, bytes) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be the path of a file; got {path!r}")
    if not os.fspath(path):
        raise ValueError(f"{argument} must be the path of a file; got an empty path")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{argument} must be the path of a file; {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{argument} needs an existing folder; got {str(path)!r}, and there is no folder "
            f"{str(path.parent)!r}"
        )
