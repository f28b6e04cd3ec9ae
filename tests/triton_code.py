"""The machine code of Triton kernels, which needs no GPU.

    python -m tests.triton_code [TARGET ...]

prints the instructions per element of AdamW in five formats, for the targets of triton_compile.py
(default sm_90).
"""

from __future__ import annotations

import re
import sys
from typing import Any

from . import cuda_code
from .cuda_code import Kernel, opcode

# Instructions of the integer units, of which a multiprocessor starts half as many per cycle.
INTEGER = re.compile(r"(LOP3|IADD3|VIADD|ISETP|SHF|SEL|PRMT|LEA|VIMNMX3?|FMNMX|FSETP|FSEL|PLOP3)\b")


def main_loop(sass: str) -> list[str]:
    """The instructions of one round of the loop over whole blocks, the only one whose stores have
    no predicate.

    The path is the shortest from the head of the loop to its end that stores: it leaves out what
    runs for operands outside of the usual range only.
    """
    kernel = Kernel("sweep", "", {}, cuda_code.instructions_in(sass))
    branches = cuda_code.branches_of(kernel)
    stores = [i for i, line in enumerate(kernel.instructions) if is_store(line)]
    loops = [(i - to, to, i) for i, to in branches.items() if any(to < s < i for s in stores)]
    _, head, end = min(loops)
    way = cuda_code.writing_way(kernel, head, end, is_store)
    return [kernel.instructions[i] for i in way]


def is_store(line: str) -> bool:
    """Whether an instruction stores to global memory, without a predicate."""
    return line.startswith("STG")


def main_loop_on_amd(text: str) -> list[str]:
    """The instructions of one round of the loop over whole blocks, in AMD assembly: the first loop
    with wide stores. No branch is in it but those around the stores of the scales, which count.
    """
    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if re.match(r"\.LBB|[a-z]\w+", line)]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    for end, line in enumerate(lines):
        head = labels.get(line.split()[-1], end) if "branch" in line else end
        if any("_store_dwordx" in stored for stored in lines[head:end]):
            return [line for line in lines[head : end + 1] if not line.endswith(":")]
    raise AssertionError("no loop with wide stores")


def main(targets: list[str]) -> None:
    """Prints one row per format and target."""
    from . import triton_compile as made

    formats = {
        "fp32": (made.FP32, made.FP32, "fp32"),
        "bf16 + split16, bf16": (made.SPLIT16, made.BF16, "bf16"),
        "bf16 + split16, mx8": (made.SPLIT16, made.BF16, "mx8"),
        "bf16 + split8, mx8": (made.SPLIT8, made.BF16, "mx8"),
        "bf16 stochastic, mx4": (made.STOCHASTIC, made.BF16, "mx4"),
    }
    for target in targets or ["sm_90"]:
        print(f"{target:<24}instructions per element (integer units), registers, spilled bytes")
        for name, formed in formats.items():
            variant = made.variant("adam", 1, *formed)
            found: dict[str, Any] = made.compiled_sweep((variant,), made.TARGETS[target])
            amd = "sass" not in found
            code = main_loop_on_amd(found["text"]) if amd else main_loop(found["sass"])
            elements = made.TUNING[64 if amd else 32].block * variant.blocks // 256
            integer = sum(bool(INTEGER.match(opcode(line))) for line in code)
            parts = "" if amd else f" ({integer / elements:.1f})"
            print(
                f"{name:<24}{len(code) / elements:.1f}{parts}, {found['registers']}, "
                f"{found['spilled']}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
