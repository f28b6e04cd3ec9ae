"""Finds the prefetch instructions in the machine code of the CPU kernels."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

# platform.machine() -> the prefetch instruction, and the number of copies of each kernel in the CPU
# library (plain, avx2 and avx512 on x86-64).
PREFETCH = {"x86_64": ("prefetcht0", 3), "aarch64": ("prfm", 1)}
# Fused kernels of AdamW -> cache lines per 32 elements: weight, companion, gradient, two states.
LINES = {
    "Half<ToBf16>, Half<ToBf16>, Fp32State": 1 + 1 + 2 * 2,
    "Fp32, Fp32, Mx8State": 2 + 2 + 2 * 1,
    "Split8Weight, Half<ToBf16>, Mx8State": 1 + 1 + 1 + 2 * 1,
    "Half<DitherBf16>, Half<ToBf16>, Mx8State": 1 + 1 + 2 * 1,
    "Half<DitherBf16>, Half<ToBf16>, Mx4State": 1 + 1 + 2 * 1,
}
KERNEL = re.compile(r"^[0-9a-f]+ <void apply_tiles<Adam<1u>, (.*)>\(.*>:$")


def disassembly(path: Path, objdump: str = "objdump") -> list[str]:
    """The lines that objdump prints for a library or an object file."""
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def prefetches(lines: list[str], instruction: str) -> dict[str, list[int]]:
    """The number of prefetches in each copy of the kernels of AdamW.

    Args:
        lines: output of :func:`disassembly`.
        instruction: the prefetch instruction of the processor.

    Returns:
        Formats, as in LINES -> one number for each copy of the kernel.
    """
    found: dict[str, list[int]] = defaultdict(list)
    copies: list[int] | None = None
    for line in lines:
        if line.endswith(">:"):
            kernel = KERNEL.match(re.sub(r"onepass::(cpu::\(anonymous namespace\)::)?", "", line))
            copies = found[kernel[1]] if kernel else None
            if copies is not None:
                copies.append(0)
        elif copies is not None and instruction in line:
            copies[-1] += 1
    return found
