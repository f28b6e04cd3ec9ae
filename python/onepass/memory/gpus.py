"""Memory capacities of GPUs by name."""

from __future__ import annotations

from ..suggestions import did_you_mean
from .sizes import parse_size

GPUS = {
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "GH200": 96,
    "A100": 80,
    "A100-40GB": 40,
    "L40S": 48,
    "A6000": 48,
    "A40": 48,
    "V100": 32,
    "L4": 24,
    "A10": 24,
    "T4": 16,
    "RTX5090": 32,
    "RTX4090": 24,
    "RTX3090": 24,
    "MI300X": 192,
    "MI250X": 128,
}
"""GB (10^9 bytes) on the data sheet; the largest version where there are several, if the name has
no size. CUDA reports slightly more."""


def capacity(device: str | int) -> int:
    """Bytes of memory of a GPU, by a name of GPUS in any case or by a size such as "24GB".

    Raises:
        ValueError: the name is unknown, or the size has no unit.
    """
    text = str(device).strip()
    name = text.upper().replace(" ", "")
    if name in GPUS:
        return GPUS[name] * 1000**3
    if text.replace(".", "", 1).isdecimal():
        raise ValueError(f"a GPU must be a name or a size with a unit; got {text}: write {text}GB")
    try:
        return parse_size(text)
    except ValueError as error:
        meant = did_you_mean(name, GPUS) or "."
        raise ValueError(
            f"no GPU {text!r}{meant} A GPU must be one of {', '.join(GPUS)}, or {error}"
        ) from None
