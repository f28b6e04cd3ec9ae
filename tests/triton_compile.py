"""Compiles kernels for targets that need not be present; run by test_triton_compile.py.

    python -m tests.triton_compile FOLDER [KERNEL.TARGET ...]

The script compiles all kernels but those named, and writes one JSON file per kernel: the PTX or
AMD assembly, the resources and, for NVIDIA, the machine code. It runs in its own process because a
process either compiles or interprets kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from onepass.formats import NATIVE, STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules import MAX_STATES
from onepass.rules import RULES as BUILT_IN
from onepass.triton_kernels import norm, prologue, rules, sums
from onepass.triton_kernels.sweep import sweep
from onepass.triton_kernels.table import TUNING
from onepass.triton_kernels.variants import Variant, Variants

from .support.custom_rules import ADABELIEF

RULES = {**BUILT_IN, ADABELIEF.name: ADABELIEF}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FP32, BF16, _ = NATIVE.values()
STOCHASTIC, SPLIT16, SPLIT8 = (
    WEIGHT_FORMATS[name].codes[torch.bfloat16] for name in ("stochastic", "split16", "split8")
)


def variant(
    rule: str,
    flags: int,
    param: int,
    grad: int,
    states: str,
    ema: bool = False,
    changed: bool = False,
) -> Variant:
    slots = {slot for slot, _ in RULES[rule].state_slots(flags)}
    code = STATE_FORMATS[states].code
    codes = tuple(code if s in slots else -1 for s in range(MAX_STATES))
    return Variant(RULES[rule], flags, param, grad, codes, ema, changed)


def every_flag(rule: str, target: str) -> tuple[Variant, ...]:
    """Half of the flag sets of a rule, with changing dtypes and formats; each of two targets gets
    one half, because compiling all for both takes minutes.

    Block formats are excluded: sixteen variants of their kernels take minutes to compile.
    """
    natives = list(NATIVE.values())
    weights = [c for form in WEIGHT_FORMATS.values() for c in form.codes.values()]
    states = [name for name, form in STATE_FORMATS.items() if form.block == 1]
    return tuple(
        variant(rule, flags, weights[i % len(weights)], natives[i % 3], states[i % len(states)])
        for i, flags in enumerate(range(1 << len(RULES[rule].flags)))
        # Split by the parity of the number of set flags, so each target has every flag set and not
        # set.
        if (flags.bit_count() + EVERY_ON.index(target)) % 2 == 0
    )


# The targets for which all flags and all small kernels are compiled.
EVERY_ON = ("sm_90", "gfx942")
KERNELS = {
    "adamw-fp32": (variant("adam", 1, FP32, FP32, "fp32"),),
    "adamw-bf16": (variant("adam", 1, BF16, BF16, "bf16"),),
    "adamw-bf16-weights": (variant("adam", 1, BF16, BF16, "fp32"),),
    "adamw-mx8": (variant("adam", 1, BF16, BF16, "mx8"),),
    "adamw-mx8-split8": (variant("adam", 1, SPLIT8, BF16, "mx8"),),
    "adamw-mx8-fp32": (variant("adam", 1, FP32, FP32, "mx8"),),
    "adamw-mx4": (variant("adam", 1, STOCHASTIC, BF16, "mx4"),),
    "adamw-split16": (variant("adam", 1, SPLIT16, BF16, "bf16"),),
    "ema-fp32": (variant("adam", 1, FP32, FP32, "fp32", True),),
    "changes-fp32": (variant("adam", 1, FP32, FP32, "fp32", changed=True),),
    "changes-bf16": (variant("adam", 1, BF16, BF16, "bf16", changed=True),),
    "changes-mx8": (variant("adam", 1, SPLIT8, BF16, "mx8", changed=True),),
    "extras-bf16": (variant("adam", 1, BF16, BF16, "bf16", True),),
    "extras-mx8": (variant("adam", 1, BF16, BF16, "mx8"),),
}


SWEEP = {
    "chunks_ptr": "*i64",
    "grads_ptr": "*i64",
    "hyper_ptr": "*fp32",
    "counters_ptr": "*i64",
    "maps_ptr": "*fp32",
    "partials_ptr": "*fp64",
    "VARIANTS": "constexpr",
    "BLOCK": "constexpr",
    "ZERO": "constexpr",
    "MEASURED": "constexpr",
}
# Integer arguments are not specialized: no divisibility is declared for them.
SMALL = {
    "norm": (
        norm.partial_norms,
        {
            "chunks_ptr": "*i64",
            "grads_ptr": "*i64",
            "formats_ptr": "*i32",
            "num_chunks": "i32",
            "partials_ptr": "*fp64",
        },
        {},
    ),
    "norm-total": (
        norm.total_norm,
        {"partials_ptr": "*fp64", "num_partials": "i32", "norm_ptr": "*fp64"},
        {},
    ),
    "telemetry-total": (
        sums.total_telemetry,
        {
            "partials_ptr": "*fp64",
            "chunks_ptr": "*i64",
            "spans_ptr": "*i64",
            "telemetry_ptr": "*fp64",
        },
        {},
    ),
    "judge": (
        prologue.judge,
        {
            "verdict_ptr": "*fp64",
            "found_ptr": "*fp64",
            "scale_ptr": "*fp32",
            "inf_ptr": "*fp32",
            "max_norm": "i64",
            **dict.fromkeys(["FOUND", "SCALED", "ASKED", "CLIPS", "LARGEST", "SKIPS"], "constexpr"),
        },
        {**dict.fromkeys(["FOUND", "SCALED", "ASKED", "CLIPS", "SKIPS"], True), "LARGEST": False},
    ),
    **{
        f"advance-{rule}": (
            prologue.advance,
            {
                "verdict_ptr": "*fp64",
                "options_ptr": "*fp64",
                "kept_ptr": "*fp32",
                "hyper_ptr": "*fp32",
                "counters_ptr": "*i64",
                **dict.fromkeys(
                    ["ADVANCE", "DERIVE", "SCALARS", "SCALAR_STATES", "JUDGED"], "constexpr"
                ),
            },
            {
                "ADVANCE": rules.advance_of(RULES[rule]),
                "DERIVE": rules.derive_of(RULES[rule]),
                "SCALARS": RULES[rule].scalars,
                "SCALAR_STATES": len(RULES[rule].scalar_states),
                "JUDGED": True,
            },
        )
        for rule in RULES
    },
}

SMALL_EVERYWHERE = ("norm", "norm-total", "telemetry-total", "judge", "advance-adam")


class Driver:
    """Names the target to kernels that depend on it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(
    function: Any, signature: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> dict[str, object]:
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    made = constants.get("VARIANTS")
    kind = (made.limited, made.small_recording) if made is not None else ()
    options = TUNING[target.warp_size].options(*kind)
    if function in (prologue.judge, prologue.advance):
        options = prologue.OPTIONS
    if function in (norm.partial_norms, norm.total_norm):
        options = norm.OPTIONS
    driver.set_active(Driver(target))
    kernel = triton.compile(source, target=target, options=options)
    found: dict[str, object] = {}
    if target.backend == "hip":
        found["text"] = text = kernel.asm["amdgcn"]
        found["llir"] = kernel.asm["llir"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        # Scalar registers are spilled to lanes of vector registers, not to memory, and do not
        # count.
        found["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        found["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        return found
    found["text"] = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, found["sass"] = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    found["spilled"] = int(re.search(r"LOCAL:(\d+)", usage)[1])
    found["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
    return found


def compiled_sweep(
    variants: tuple[Variant, ...], target: GPUTarget, extras: bool = False
) -> dict[str, object]:
    """The sweep kernel of some variants.

    Args:
        extras: whether it zeroes the gradients and measures.
    """
    block = TUNING[target.warp_size].block
    made = Variants(variants)
    constants = {"VARIANTS": made, "BLOCK": block, "ZERO": extras, "MEASURED": extras}
    return compiled(sweep, SWEEP, constants, target)


def main(folder: Path, *left_out: str) -> None:
    """Compiles the kernels for every target and writes the files.

    Args:
        folder: where the files are written.
        left_out: kernels that are not compiled, as kernel.target.
    """
    for name, target in TARGETS.items():
        every = name in EVERY_ON
        small = {k: v for k, v in SMALL.items() if every or k in SMALL_EVERYWHERE}
        found = {
            k: compiled(*kernel, target)
            for k, kernel in small.items()
            if f"{k}.{name}" not in left_out
        }
        kernels = dict(KERNELS)
        if every:
            kernels |= {f"every-{rule}": every_flag(rule, name) for rule in RULES}
        for kernel, variants in kernels.items():
            if f"{kernel}.{name}" in left_out:
                continue
            found[kernel] = compiled_sweep(variants, target, extras=kernel.startswith("extras-"))
            found[kernel]["scalars"] = variants[0].scalars
        for kernel, what in found.items():
            (folder / f"{kernel}.{name}.json").write_text(json.dumps(what))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
