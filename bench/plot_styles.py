"""Colours and markers of providers in plots."""

from __future__ import annotations

# The colours of Okabe and Ito, which colour-blind readers can distinguish, without their yellow,
# which is too light on white.
COLOURS = {
    "onepass": "#0072B2",
    "torch": "#E69F00",
    "deepspeed": "#009E73",
    "flashoptim": "#56B4E9",
    "torchao": "#CC79A7",
    "bitsandbytes": "#D55E00",
}
"""Library -> its colour; other libraries are black."""


def colour(provider: str) -> str:
    """The colour of a provider: that of its library, the part of its name before the hyphen."""
    return COLOURS.get(provider.partition("-")[0], "#000000")


# Marker shapes distinguish providers of one library, and all of them in black and white.
MARKERS = {
    "onepass-cpu": "o",
    "onepass-cuda": "o",
    "onepass-triton": "v",
    "torch-fused": "s",
    "torch-foreach": "D",
    "deepspeed-cpu": "^",
}
