"""The table of backends and the choice between them."""

from __future__ import annotations

import warnings

import torch

from ...formats import NATIVE, STATE_FORMATS
from ...rules import RULES, Rule
from .. import libraries
from .base import NO_SWITCHES, Backend, Entry, Policy, StepArgs, StepSwitches
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "NO_SWITCHES",
    "Backend",
    "Entry",
    "Policy",
    "StepArgs",
    "StepSwitches",
    "choose",
    "status",
    "support_matrix",
]

# In order of preference.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}

# Device types that a backend serves only if the user names the backend: Triton's interpreter on the
# CPU is meant for testing kernels.
BY_NAME_ONLY: dict[str, tuple[str, ...]] = {"triton": ("cpu",)}


def check_name(name: str | None) -> None:
    """Raises ValueError unless name is None or the name of a backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}; got {name!r}")


def choose(device: torch.device, name: str | None = None, rule: Rule | None = None) -> Backend:
    """Chooses the backend for a device.

    Warns if name is None and only the reference backend can serve the device, or if Triton serves
    an NVIDIA GPU because the compiled CUDA library cannot.

    Args:
        device: device of the parameters.
        name: name of the backend; None for the first backend that serves the device.
        rule: the rule of the optimizer; None if the backend only computes verdicts.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot serve the device; the message gives the reason and
            the backends that can. Also raised for a custom rule on a GPU without Triton functions,
            unless the reference backend is named.
    """
    check_name(name)

    def cannot(backend: Backend) -> str:
        return backend.unavailable(device) or ("" if rule is None else backend.lacks(rule))

    if name is not None:
        if why_not := cannot(BACKENDS[name]):
            others = [b.name for b in BACKENDS.values() if not cannot(b)]
            raise RuntimeError(
                f"backend {name!r} cannot serve parameters on {device}: {why_not}. "
                f"Backends that can: {', '.join(others) or 'none'}"
            )
        return BACKENDS[name]
    served = [b for b in BACKENDS.values() if device.type not in BY_NAME_ONLY.get(b.name, ())]
    # The generator stops at the first backend that can: to ask Triton imports it.
    found = next(b for b in served if not cannot(b))
    if found.name == "reference":
        reasons = [f"{b.name}: {cannot(b)}" for b in served if b is not found]
        message = f"onepass uses its slow reference backend on {device} ({'; '.join(reasons)})"
        if rule is not None and rule.options is not None:
            if device.type == "cpu":
                message = f"the rule {rule.name!r} runs in NumPy on {device}: exact but slow"
            elif lacks := BACKENDS["triton"].lacks(rule):
                raise RuntimeError(
                    f"parameters on {device}: {lacks}. backend='reference' runs the NumPy update, "
                    "which is exact but slow"
                )
        warnings.warn(message, stacklevel=2)
    built = bool(torch.version.cuda) and libraries.CUDA_LIBRARY.exists()
    if found.name == "triton" and built and (why_not := BACKENDS["cuda"].unavailable(device)):
        warnings.warn(f"onepass uses Triton on {device}: {why_not}", stacklevel=2)
    return found


def status() -> list[tuple[str, str]]:
    """Pairs (backend, reason why it is unavailable or an empty string), in order of preference."""
    return [(b.name, b.unavailable(None)) for b in BACKENDS.values()]


def support_matrix() -> str:
    """The support matrix of rules, formats and backends as a Markdown table."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in NATIVE)
    names = [f"`{name}`" for name in BACKENDS]
    lines = [
        f"| rule | options | states | weights and gradients | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for rule in RULES.values():
        options = ", ".join(flag.name for flag in rule.flags)
        held = ", ".join(rule.keys)
        formats = ", ".join(f"`{name}`" for name in rule.formats or STATE_FORMATS)
        served = " | ".join("no" if b.lacks(rule) else "yes" for b in BACKENDS.values())
        lines.append(f"| {rule.name} | {options} | {held}: {formats} | {dtypes} | {served} |")
    return "\n".join(lines)
