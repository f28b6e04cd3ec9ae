"""The variants of the CUDA kernels that :mod:`bench.tuning` builds and measures, and their formats.

A variant is a CUDA library with other values of the launch shape, the chunk length, the taper, the
prefetch and the ring than csrc/cuda/tuning.h. It contains only the kernels of FORMATS.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.param_lists import one

from . import results, sources

FOLDER = results.ROOT / "build" / "tuning"


@dataclass(frozen=True)
class Variant:
    """The values of a variant.

    Attributes:
        threads: threads per thread block.
        blocks: thread blocks per multiprocessor, which limits the registers of a thread.
        chunk: elements per thread block; half as many if the states are fp32.
        prefetch: whether a warp prefetches its next elements into L2 while it computes.
        ring: stages of the ring of bulk copies (csrc/cuda/ring.cuh), which replaces the prefetch;
            0 for none.
        taper: waves of chunks of a quarter of the length, which end a list; 0 for none.
    """

    threads: int
    blocks: int
    chunk: int
    prefetch: bool = True
    ring: int = 0
    taper: int = 2

    @property
    def name(self) -> str:
        """The name in result lines and file names, for example 128x6-16K."""
        other = f"-ring{self.ring}" if self.ring else "" if self.prefetch else "-no-prefetch"
        other += "" if self.taper else "-no-taper"
        return f"{self.threads}x{self.blocks}-{self.chunk // 1024}K{other}"

    @property
    def macros(self) -> dict[str, int]:
        """Name -> value of the macros for csrc/cuda/tuning.h."""
        return {
            "ONEPASS_THREADS": self.threads,
            "ONEPASS_BLOCKS_PER_SM": self.blocks,
            "ONEPASS_CHUNK": self.chunk,
            "ONEPASS_WIDE_CHUNK": self.chunk // 2,
            "ONEPASS_PREFETCH": int(self.prefetch),
            "ONEPASS_RING": self.ring,
            "ONEPASS_TAPER": self.taper,
        }

    @property
    def defines(self) -> str:
        """The macros in the form that ONEPASS_CUDA_DEFINES of setup.py expects."""
        return " ".join(
            ["ONEPASS_TUNING", *(f"{name}={value}" for name, value in self.macros.items())]
        )


SHAPES = ((128, 6), (256, 3), (128, 4), (256, 2), (512, 1))
CHUNKS = (16384, 32768, 65536)
RINGS = tuple(Variant(128, 6, 16384, ring=stages) for stages in (2, 3))
"""The variants with a ring, which has not run on a GPU. Their bits are compared even if another
variant is the fastest."""
VARIANTS = (
    *(Variant(threads, blocks, chunk) for chunk in CHUNKS for threads, blocks in SHAPES),
    *RINGS,
    # Show how much the prefetch and the taper gain with the chunk length of tuning.h.
    *(Variant(threads, blocks, CHUNKS[0], prefetch=False) for threads, blocks in SHAPES[:2]),
    *(Variant(threads, blocks, CHUNKS[0], taper=0) for threads, blocks in SHAPES[:2]),
)
BASE = VARIANTS[0]
"""The values of the macros in csrc/cuda/tuning.h."""

FORMATS = {
    "fp32": ("fp32", "native", "fp32"),
    "split16+bf16": ("bf16", "split16", "bf16"),
    "split16+mx8": ("bf16", "split16", "mx8"),
    "split8+mx8": ("bf16", "split8", "mx8"),
    "stochastic+mx4": ("bf16", "stochastic", "mx4"),
}
"""Name -> (dtype of the weights, format of the weights, format of the states). The function
is_tuned in csrc/cuda/combinations.h lists the same five."""


def today(name: str) -> Variant:
    """The variant with the values that csrc/cuda/tuning.h has for a format of FORMATS."""
    large = FORMATS[name][2] in ("fp32", "bf16")
    return replace(BASE, threads=256, blocks=3) if large else BASE


def case_of(name: str, numel: int) -> Case:
    """The case of AdamW on one tensor with a format of FORMATS."""
    dtype, weights, states = FORMATS[name]
    return Case("adamw", dtype, states, one(numel), weights)


def digest_cases(name: str) -> str:
    """The pattern of the cases of :mod:`bench.digest` whose kernels a variant contains."""
    dtype, weights, states = FORMATS[name]
    return f"AdamW(lr=0.01,weight_decay=0.1) {dtype}+{weights} grad {dtype} {states} "


def architecture() -> str:
    """The architecture of the variants: ONEPASS_CUDA_ARCH, or 9.0 (H200) if it is not set."""
    return os.environ.get("ONEPASS_CUDA_ARCH") or "9.0"


def source_hash() -> str:
    """Hash of everything that variants are built from, in 12 hexadecimal digits: the sources of the
    kernels, setup.py and the architecture."""
    found = hashlib.sha256(f"{architecture()} {sources.kernel_hashes()['cuda']}".encode())
    found.update((results.ROOT / "setup.py").read_bytes())
    return found.hexdigest()[:12]


def library_of(variant: Variant, folder: Path, built_of: str) -> Path:
    """Path of the library of a variant.

    Args:
        variant: the variant.
        folder: folder of the libraries.
        built_of: the result of :func:`source_hash`. The file name depends on it and on the macros.
    """
    key = hashlib.sha256(f"{built_of} {variant.defines}".encode()).hexdigest()[:12]
    return folder / f"{variant.name}-{key}.so"
