"""A progress bar, where there is somebody to see it."""

from __future__ import annotations

import sys
from typing import Any


class _NoBar:
    """Stands for a progress bar where nobody would see it."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        pass


def progress_bar(loader: Any, epochs: int, done: int, shown: bool) -> Any:
    """tqdm's on stderr, where that is a terminal and tqdm is installed; else nothing."""
    if not shown or not sys.stderr.isatty():
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    total = epochs * len(loader) if hasattr(loader, "__len__") else None
    return tqdm(total=total, initial=done, unit="step")
