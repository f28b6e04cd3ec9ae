"""The name of a device for results and plots."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from onepass.engine import libraries


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU; or the name of the CPU, its threads and its instruction set."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    """The CPU name, family and model (virtual machines can hide the name), threads and ISA."""
    name, family, model = platform.processor() or platform.machine(), "", ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        found = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
        name = found.get("model name", name)
        family, model = found.get("cpu family", ""), found.get("model", "")
    numbers = f" (family {family} model {model})" if family and model else ""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{name}{numbers}, {threads}, {_isa()}"


def _isa() -> str:
    try:
        return libraries.cpu_isa()
    except RuntimeError:
        return "no compiled library"
