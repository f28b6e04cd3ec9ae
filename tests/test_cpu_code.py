"""Prefetch instructions in the machine code of the CPU library.

A compiler may drop them without a change of results; only a benchmark would show it.
"""

from __future__ import annotations

import platform
import shutil
from functools import cache

import pytest

import onepass

from .support.machine_code import LINES, PREFETCH, disassembly, prefetches

INSTRUCTION, COPIES = PREFETCH.get(platform.machine(), ("", 0))


@cache
def of_library() -> dict[str, list[int]]:
    return prefetches(disassembly(onepass.ops.LIBRARY), INSTRUCTION)


@pytest.mark.skipif(not COPIES, reason="looks for an instruction of x86-64 or aarch64")
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump, of binutils, is not there")
@pytest.mark.parametrize("formats", LINES)
def test_a_kernel_prefetches_all_its_streams(formats: str) -> None:
    copies = of_library()[formats]
    assert len(copies) == COPIES
    assert min(copies) >= LINES[formats]
