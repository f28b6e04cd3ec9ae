"""The list of providers: the onepass backends and other libraries."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from onepass.integrations.other_libraries import CLASSES as PEER_CLASSES
from onepass.integrations.other_libraries import TORCH, TORCH_LOOPS, Library

from .cases import OPTIONS
from .peers import PEERS
from .provider import (
    AS_WEIGHTS,
    BLOCKS,
    COMPILED,
    CPU,
    CUDA,
    FP32_CORRECTION,
    Provider,
    made,
)

ONEPASS = Library("onepass", "onepass", "onepass")


def _onepass(backend: str) -> Provider:
    devices = CUDA if backend in ("cuda", "triton") else CPU
    return Provider(f"onepass-{backend}", ONEPASS, {}, devices, ours=True, backend=backend)


def _torch(
    name: str, loop: str, rules: Iterable[str] = tuple(OPTIONS), slack: float = 0.0, **more: Any
) -> Provider:
    """A provider for the torch.optim classes of those rules that torch.optim implements."""
    makers = {
        peer.twin: made(peer, **TORCH_LOOPS[loop])
        for peer in PEER_CLASSES.values()
        if peer.library == TORCH and peer.twin in rules and peer.twin in OPTIONS
    }
    return Provider(f"torch-{name}", TORCH, makers, formats=AS_WEIGHTS, slack=slack, **more)


OURS_AND_TORCH = [
    _onepass("cpu"),
    _onepass("cuda"),
    _onepass("triton"),
    # The fp32 reference for cases with block-scaled states.
    Provider(
        "torch-fused-fp32",
        TORCH,
        {"adamw": made(PEER_CLASSES["torch.AdamW"], fused=True)},
        formats=frozenset(),
        compared=BLOCKS,
        dtype="fp32",
        state_bytes=4,
    ),
    _torch("fused", "fused", ("adamw", "sgd", "adagrad"), devices=CPU),
    # The CUDA kernel computes the bias correction in fp32, like a compiled step.
    _torch("fused", "fused", ("adamw", "sgd"), FP32_CORRECTION, devices=CUDA),
    _torch("foreach", "foreach"),
    _torch("forloop", "loop"),
    _torch("compiled", "foreach", slack=FP32_CORRECTION, compiled=True, most_tensors=COMPILED),
]


def all_providers(device: str = "cpu", custom: bool = False) -> list[Provider]:
    """Every provider that supports a device type, onepass first, including uninstalled ones.

    Args:
        device: the device type.
        custom: whether a custom rule is measured, which runs in the reference backend on a CPU.
    """
    found = [*([_onepass("reference")] if custom else []), *OURS_AND_TORCH, *PEERS]
    return [p for p in found if device in p.devices]


def find(providers: list[Provider], patterns: str | None) -> list[Provider]:
    """The providers whose names match one of the comma-separated patterns; all for None.

    Raises:
        ValueError: a pattern matches no provider; the message lists the providers.
    """
    if patterns is None:
        return providers
    wanted = patterns.split(",")
    names = [provider.name for provider in providers]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no provider {pattern}; the providers are {', '.join(names)}")
    return [p for p in providers if any(fnmatch(p.name, pattern) for pattern in wanted)]
