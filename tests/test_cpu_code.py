"""The machine code of the built CPU library: what a compiler drops and nothing but time shows."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache

import pytest

import onepass

ISAS = 3  # plain, avx2, avx512: each has a copy of every kernel
KERNEL = re.compile(r"^[0-9a-f]+ <void (apply_tiles<Adam<1u>, .*>)\(.*>:$")


@cache
def prefetches() -> dict[str, list[int]]:
    """How often each kernel of AdamW asks for a cache line, in each of its copies."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(onepass.ops.LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[int]] = defaultdict(list)
    copies: list[int] | None = None
    for line in text.splitlines():
        if line.endswith(">:"):
            kernel = KERNEL.match(re.sub(r"onepass::(cpu::\(anonymous namespace\)::)?", "", line))
            copies = found[kernel[1]] if kernel else None
            if copies is not None:
                copies.append(0)
        elif copies is not None and "prefetcht0" in line:
            copies[-1] += 1
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for an instruction of x86-64")
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump, of binutils, is not there")
@pytest.mark.parametrize(
    ("formats", "lines"),  # of weight, companion, gradient and two states, for 32 elements
    [
        ("Half<ToBf16>, Half<ToBf16>, Fp32State", 1 + 1 + 2 * 2),
        ("Fp32, Fp32, Mx8State", 2 + 2 + 2 * 1),
        ("Split8Weight, Half<ToBf16>, Mx8State", 1 + 1 + 1 + 2 * 1),
        ("Half<DitherBf16>, Half<ToBf16>, Mx8State", 1 + 1 + 2 * 1),
        ("Half<DitherBf16>, Half<ToBf16>, Mx4State", 1 + 1 + 2 * 1),
    ],
)
def test_a_kernel_asks_for_all_its_streams(formats: str, lines: int) -> None:
    copies = prefetches()[f"apply_tiles<Adam<1u>, {formats}>"]
    assert len(copies) == ISAS
    assert min(copies) >= lines
