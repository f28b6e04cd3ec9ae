"""A progress bar that is shown only on a terminal."""

from __future__ import annotations

import sys
from typing import Any


class _NoBar:
    """A progress bar that shows nothing, with the methods of tqdm that the trainer uses."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        """Does nothing."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Does nothing."""


def progress_bar(loader: Any, epochs: int, done: int, shown: bool) -> Any:
    """A tqdm bar if ``shown``, stderr is a terminal and tqdm is installed; else an invisible bar.

    Args:
        loader: the data loader; its length, if any, is the number of steps per epoch.
        epochs: the number of epochs.
        done: the number of steps already done.
        shown: whether the caller wants a bar.
    """
    if not shown or not sys.stderr.isatty():
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    total = epochs * len(loader) if hasattr(loader, "__len__") else None
    return tqdm(total=total, initial=done, unit="step")
