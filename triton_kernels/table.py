"""What kernels agree on: the columns of the chunk table, and the sizes of blocks and programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .. import rules as rule_table

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Columns of the chunk table, int64, a row per chunk.
PARAM = tl.constexpr(0)  # address of the chunk's first element
COMPANION = tl.constexpr(1)  # of the weight's companion
AVERAGE = tl.constexpr(2)  # of the weight's average
ENTRY = tl.constexpr(3)  # row of the gradient table, which holds the addresses of whole gradients
START = tl.constexpr(4)  # position of the chunk in its tensors
COUNT = tl.constexpr(5)  # its elements
ROW = tl.constexpr(6)  # of the hyperparameter and counter tables
PARAM_ID = tl.constexpr(7)  # keys the random bits
INDEX = tl.constexpr(8)  # likewise: of the first element in the whole parameter
VARIANT = tl.constexpr(9)  # position in VARIANTS
STATES = tl.constexpr(10)  # addresses of the states, a column for each slot
SCALES = tl.constexpr(10 + rule_table.MAX_STATES)  # of their scales
COLUMNS = tl.constexpr(10 + 2 * rule_table.MAX_STATES)

HYPER_WIDTH = tl.constexpr(rule_table.HYPER_WIDTH)


@dataclass(frozen=True)
class Tuning:
    """Elements that a program takes at once, warps of a program, elements of a chunk, and the most
    registers of a thread where states have 8 bits or fewer.

    A block is four elements a thread: one 16-byte access for fp32 and 8 bytes for 16-bit formats.
    With more, Triton would lay out fp32 and narrower tensors differently when it writes them, and
    exchange them through shared memory. Variants with 8-bit states that write no fp32 take two
    blocks at once: 8 bytes for the codes.

    Chunks are whole blocks, and a multiple of every format's block, so that no two programs share a
    scale. With 128 registers two programs fit an NVIDIA multiprocessor; ptxas would take more for
    8-bit states. (For AMD, Triton can bound registers only by a number of waves; none is set.)
    """

    block: int
    num_warps: int
    chunk: int
    registers: int | None

    def options(self, narrow: bool = False) -> dict[str, Any]:
        """What kernels are compiled with; narrow: for states of 8 bits or fewer."""
        found = {"num_warps": self.num_warps, "enable_fp_fusion": False, "sanitize_overflow": False}
        return {**found, "maxnreg": self.registers} if narrow and self.registers else found


# By warp size: NVIDIA, AMD CDNA. Untuned.
TUNING = {32: Tuning(1024, 8, 8192, 128), 64: Tuning(1024, 4, 8192, None)}
THREADS = tl.constexpr(256)  # of a program, in each of them


def tuning(device: torch.device) -> Tuning:
    """The row of :data:`TUNING` for a device."""
    if device.type == "cpu":
        return TUNING[32]
    return TUNING[torch.cuda.get_device_properties(device).warp_size]
