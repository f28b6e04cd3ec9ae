"""Choices by name: a wrong one is answered with those there are."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def check_name(argument: str, name: object, known: Collection[str]) -> None:
    """Raises ValueError unless ``name`` is one of ``known``; it lists them, the nearest first."""
    if name in known:
        return
    near = difflib.get_close_matches(str(name).lower(), known, n=2, cutoff=0.6)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(known)}; got {name!r}{hint}")
