"""Parsing and formatting of memory sizes."""

from __future__ import annotations

import re

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)")
ACCEPTED = "a number with B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024)"


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GB" (1 GB is 10^9 bytes) or "512MiB" (1 MiB is 2^20 bytes).

    Raises:
        ValueError: the text is not a size, or the size is below 1 byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"a size must be {ACCEPTED}, for example 24GB; got {text!r}")
    return size


def show(count: float) -> str:
    """Formats a number of bytes with a unit (powers of 1000) and at least three digits."""
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if abs(count) >= 0.9995 * 1000**power:
            value = count / 1000**power
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {letter}B"
    return f"{count:.0f} B"
