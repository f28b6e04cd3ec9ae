"""The variants of the CUDA kernels that :mod:`bench.tuning` builds and measures, and their formats.

A variant is a CUDA library whose launch shape, chunk length and prefetch are other values of
csrc/cuda/tuning.h. It has the kernels of FORMATS alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.param_lists import one

from . import results, sources

FOLDER = results.ROOT / "build" / "tuning"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        threads: of a block.
        blocks: per multiprocessor, which registers are rationed for.
        chunk: elements that a block takes; half as many where the states are fp32.
        prefetch: whether a warp fetches its next elements into L2 while it computes.
    """

    threads: int
    blocks: int
    chunk: int
    prefetch: bool = True

    @property
    def name(self) -> str:
        """As in the results and in file names: 128x6-16K."""
        plain = "" if self.prefetch else "-no-prefetch"
        return f"{self.threads}x{self.blocks}-{self.chunk // 1024}K{plain}"

    @property
    def macros(self) -> dict[str, int]:
        """What csrc/cuda/tuning.h is compiled with."""
        return {
            "ONEPASS_THREADS": self.threads,
            "ONEPASS_BLOCKS_PER_SM": self.blocks,
            "ONEPASS_CHUNK": self.chunk,
            "ONEPASS_WIDE_CHUNK": self.chunk // 2,
            "ONEPASS_PREFETCH": int(self.prefetch),
        }

    @property
    def defines(self) -> str:
        """The macros as ONEPASS_CUDA_DEFINES of setup.py takes them."""
        return " ".join(
            ["ONEPASS_TUNING", *(f"{name}={value}" for name, value in self.macros.items())]
        )


SHAPES = ((128, 6), (256, 3), (128, 4), (256, 2), (512, 1))
CHUNKS = (16384, 8192, 32768, 65536)
VARIANTS = (
    *(Variant(threads, blocks, chunk) for chunk in CHUNKS for threads, blocks in SHAPES),
    # What the prefetch gains, at today's chunk.
    *(Variant(threads, blocks, CHUNKS[0], prefetch=False) for threads, blocks in SHAPES[:4]),
)
TODAY = VARIANTS[0]
"""The values that csrc/cuda/tuning.h has without macros."""

FORMATS = {
    "fp32": ("fp32", "native", "fp32"),
    "split16+bf16": ("bf16", "split16", "bf16"),
    "split16+mx8": ("bf16", "split16", "mx8"),
    "split8+mx8": ("bf16", "split8", "mx8"),
    "stochastic+mx4": ("bf16", "stochastic", "mx4"),
}
"""Name -> (dtype, format of the weights, format of the states); csrc/cuda/combinations.h has the
same five in is_tuned."""


def case_of(name: str, numel: int) -> Case:
    """AdamW on one tensor in a format of FORMATS."""
    dtype, weights, states = FORMATS[name]
    return Case("adamw", dtype, states, one(numel), weights)


def digest_cases(name: str) -> str:
    """The pattern of the cases of :mod:`bench.digest` that a variant has the kernels for."""
    dtype, weights, states = FORMATS[name]
    return f"AdamW(lr=0.01,weight_decay=0.1) {dtype}+{weights} grad {dtype} {states} "


def architecture() -> str:
    """What variants are compiled for; an H200's unless ONEPASS_CUDA_ARCH names another."""
    return os.environ.get("ONEPASS_CUDA_ARCH") or "9.0"


def source_hash() -> str:
    """Of all that variants are built of, in 12 hexadecimal digits: the kernels' sources, the flags
    and the architecture."""
    found = hashlib.sha256(f"{architecture()} {sources.kernel_hashes()['cuda']}".encode())
    found.update((results.ROOT / "setup.py").read_bytes())
    return found.hexdigest()[:12]


def library_of(variant: Variant, folder: Path, built_of: str) -> Path:
    """Where the library of a variant is, whose name changes with source_hash and its macros."""
    key = hashlib.sha256(f"{built_of} {variant.defines}".encode()).hexdigest()[:12]
    return folder / f"{variant.name}-{key}.so"
