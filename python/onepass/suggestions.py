"""Suggestions for misspelt names. The command line imports this without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache


@lru_cache
def nearest(name: str, known: frozenset[str], count: int, cutoff: float) -> tuple[str, ...]:
    """The known names most like a name, the nearest first; case counts.

    Args:
        name: the name found.
        known: the accepted names.
        count: how many names to return at most.
        cutoff: the least similarity, in [0, 1]; see difflib.get_close_matches.
    """
    return tuple(difflib.get_close_matches(name, sorted(known), count, cutoff))


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the end of an error message; empty if nothing is near.

    Args:
        name: the value found; upper and lower case are not told apart.
        known: the accepted names.
        cutoff: see :func:`nearest`.
    """
    by_lower = {word.lower(): word for word in known}
    found = nearest(str(name).lower(), frozenset(by_lower), 2, cutoff)
    return f"; did you mean {' or '.join(repr(by_lower[word]) for word in found)}?" if found else ""
