"""The columns of the chunk table, and the launch shapes of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import current_target

from .. import rules as rule_table

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.constexpr_function
def on_nvidia():
    """Whether the kernel is being compiled for an NVIDIA GPU."""
    target = None if INTERPRETED else current_target()
    return target is not None and target.backend == "cuda"


# Columns of the chunk table, int64, with one row per chunk.
PARAM = tl.constexpr(0)  # address of the chunk's first element
COMPANION = tl.constexpr(1)  # address of the companion of the weight
AVERAGE = tl.constexpr(2)  # address of the average of the weight
ENTRY = tl.constexpr(3)  # row of the gradient table, which holds the addresses of whole gradients
START = tl.constexpr(4)  # position of the first element in the parameter and gradient
COUNT = tl.constexpr(5)  # number of elements
ROW = tl.constexpr(6)  # row of the hyperparameter and counter tables
PARAM_ID = tl.constexpr(7)  # selects the random bits
INDEX = tl.constexpr(8)  # index of the first element in the unsharded parameter; likewise
VARIANT = tl.constexpr(9)  # position in VARIANTS
CHANGED = tl.constexpr(10)  # address of the word of the first element in the record of changes
STATES = tl.constexpr(11)  # addresses of the states, one column per slot
SCALES = tl.constexpr(11 + rule_table.MAX_STATES)  # addresses of their scales
COLUMNS = tl.constexpr(11 + 2 * rule_table.MAX_STATES)

HYPER_WIDTH = tl.constexpr(rule_table.HYPER_WIDTH)


@dataclass(frozen=True)
class Tuning:
    """A launch shape.

    A block has four elements per thread: one 16-byte access for fp32, and 8 bytes for 16-bit
    formats. With more elements, Triton would choose different layouts for stores of fp32 and of
    narrower tensors, and convert between them through shared memory. Variants that write no fp32
    take two blocks at once, so that an access has 16 bytes for 16-bit formats, and 8 for codes of 8
    bits. This also halves the instructions of the loop.

    A chunk is a multiple of the block and of the blocks of all formats, so that no two programs
    share a scale. With at most 128 registers per thread, two programs fit on an NVIDIA
    multiprocessor; ptxas would use more registers for eight elements. (For AMD, Triton can limit
    registers only by the number of waves; no limit is set.)

    Attributes:
        block: elements that a program takes at once.
        num_warps: warps per program.
        chunk: elements per chunk.
        registers: the limit of registers per thread for states of 8 bits or fewer and for eight
            elements per thread; None for no limit.
        recording: the limit for small kernels that record changes (Variants.small_recording),
            which ptxas would give 96 registers: with 80, three programs fit on a multiprocessor.
    """

    block: int
    num_warps: int
    chunk: int
    registers: int | None
    recording: int | None = None

    def options(self, limited: bool = False, small_recording: bool = False) -> dict[str, Any]:
        """The compile options of a kernel.

        Args:
            limited: see Variants.
            small_recording: see Variants.
        """
        found = {"num_warps": self.num_warps, "enable_fp_fusion": False, "sanitize_overflow": False}
        limit = self.registers if limited else self.recording if small_recording else None
        return {**found, "maxnreg": limit} if limit else found


# Warp size -> launch shape: 32 is NVIDIA, 64 is AMD CDNA. Untuned.
TUNING = {32: Tuning(1024, 8, 8192, 128, 80), 64: Tuning(1024, 4, 8192, None)}
THREADS = tl.constexpr(256)  # threads per program, in both rows


def tuning(device: torch.device) -> Tuning:
    """The row of :data:`TUNING` for a device."""
    if device.type == "cpu":
        return TUNING[32]
    return TUNING[torch.cuda.get_device_properties(device).warp_size]
