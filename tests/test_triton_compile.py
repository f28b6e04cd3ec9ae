"""The code that Triton generates for GPUs, which need not be present."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import onepass
from onepass.engine.backends.triton import CONTRACTS, _version

from . import triton_code
from .support.thorough import THOROUGH

HERE = Path(__file__).parent
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
RULES = (*onepass.rules.RULES, "adabelief")
EVERY = tuple(f"every-{rule}" for rule in RULES)
ROOTLESS = ("every-sgd", "every-lion", "every-muon")  # no square root and no division
SMALL = ("judge", "advance-adam", *(f"advance-{rule}" for rule in RULES if rule != "adam"))

# A program has 256 threads and a multiprocessor 65,536 registers: 64 registers per thread allow
# four programs, 80 allow three. In fp32 a thread has 4 loads of 16 bytes in flight, 64 KiB per
# multiprocessor. An H100 needs 20 KiB in flight (bandwidth times latency: 3.35 TB/s over 132
# multiprocessors, about 800 ns). On gfx942, 64 registers still allow eight waves, the maximum of a
# SIMD.
MAX_REGISTERS = {"adamw-fp32": 64, "adamw-bf16-weights": 64}
# If no fp32 is written, a thread processes eight elements. With two programs per multiprocessor,
# 32 KiB are in flight with 16-bit tensors, and 24 KiB with 8-bit states.
EIGHT_BITS = ("adamw-mx8", "adamw-mx8-split8", "adamw-mx8-fp32", "adamw-mx4")
MAX_REGISTERS |= dict.fromkeys(("adamw-bf16", "adamw-split16", *EIGHT_BITS), 128)
# A thread of the norm has 4 loads of 16 bytes in flight in every format. On gfx942 it has 2, and a
# program has 512 threads: 128 registers allow four waves per SIMD and two programs per compute
# unit, 32 KiB in flight. An MI300X needs 14 KiB (bandwidth times latency: 5.3 TB/s over 304 compute
# units, about 800 ns).
MAX_REGISTERS |= {"norm": 80, "norm-total": 64}
# Kernels with optional work. The average is one more tensor, 20 KiB in flight with three programs;
# telemetry keeps four sums per thread and leaves room for two programs.
MAX_REGISTERS |= {"ema-fp32": 80, "extras-bf16": 128, "extras-mx8": 128, "telemetry-total": 64}
# A record of changes adds one bit per element.
MAX_REGISTERS |= {"changes-fp32": 80, "changes-bf16": 128, "changes-mx8": 128}
# These kernels run as a single warp.
MAX_REGISTERS |= dict.fromkeys(("judge", "advance-adam"), 64)
MAX_REGISTERS_AMD = {**MAX_REGISTERS, "norm": 128, "extras-mx8": 168}
# Kernels with fp32 arithmetic on elements, compiled for every target.
FP32_KERNELS = ("adamw-fp32", "adamw-bf16", "adamw-bf16-weights", "adamw-split16", *EIGHT_BITS)
FP32_KERNELS += ("ema-fp32", "extras-bf16", "extras-mx8", "norm")
FP32_KERNELS += ("changes-fp32", "changes-bf16", "changes-mx8")

# The kernels that `make test` compiles.
FEW = {
    "sm_80": ("adamw-fp32", "adamw-mx8"),
    "sm_90": (
        *("adamw-fp32", "adamw-bf16", "adamw-split16", "adamw-mx8-split8"),
        *("adamw-mx4", "extras-bf16", "every-adabelief", "norm", "judge", "advance-adam"),
    ),
    "sm_100": ("adamw-fp32",),
    "gfx942": ("adamw-fp32", "adamw-split16", "adamw-mx8-split8", "extras-bf16", "norm", "judge"),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_compiled(script: str, cache: Path, *arguments: str) -> str:
    """Runs a module of this folder in a process that compiles kernels; returns its output."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", f"tests.{script}", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def is_left_out(name: str) -> bool:
    """Whether `make test` does not compile a kernel, named as kernel.target."""
    kernel, target = name.split(".")
    return not THOROUGH and kernel not in FEW[target]


class Kernels(dict[str, Any]):
    """Name -> the generated code of a kernel; skips the test if the kernel was left out."""

    def __missing__(self, name: str) -> Any:
        if is_left_out(name):
            pytest.skip("make test-all compiles this kernel")
        raise KeyError(name)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The generated code of all kernels. Compiled kernels are cached in build/."""
    folder = tmp_path_factory.mktemp("kernels")
    names = [
        f"{kernel}.{target}" for kernel in (*MAX_REGISTERS, *EVERY, *SMALL) for target in TARGETS
    ]
    left_out = filter(is_left_out, names)
    cache = HERE.parent / "build" / "tests" / "triton"
    run_compiled("triton_compile", cache, str(folder), *left_out)
    return Kernels((path.stem, json.loads(path.read_text())) for path in folder.glob("*.json"))


ACCESS = re.compile(r"^\s*(@%p\d+ )?(ld|st)\.global(?:\.\w+)*?((?:\.v\d)?\.b\d+)\b", re.MULTILINE)


def accesses(text: str) -> list[tuple[bool, str, int]]:
    """Every access to global memory in PTX as (predicated, "ld" or "st", bytes)."""
    found = []
    for predicate, kind, shape in ACCESS.findall(text):
        numbers = [int(n) for n in re.findall(r"\d+", shape)]
        bits = numbers[-1] * (numbers[0] if len(numbers) == 2 else 1)
        found.append((bool(predicate), kind, bits // 8))
    assert len(found) == len(re.findall(r"\b(?:ld|st)\.global", text))
    return found


# The assembly in the kernels, which test_triton_assembly.py runs.
INLINE = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)


def main_path(ptx: str) -> str:
    """The basic block of the loop over whole blocks, the only one with unpredicated stores."""
    blocks = re.split(r"^\$L__BB\w+:.*$", ptx, flags=re.MULTILINE)
    (block,) = [b for b in blocks if (False, "st") in {a[:2] for a in accesses(b)}]
    return block


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [
        ("adamw-fp32", [16, 16, 16, 16], [16, 16, 16]),
        ("adamw-bf16", [16, 16, 16, 16], [16, 16, 16]),
        ("adamw-bf16-weights", [8, 8, 16, 16], [8, 16, 16]),
        ("ema-fp32", [16, 16, 16, 16, 16], [16, 16, 16, 16]),
    ],
)
def test_the_main_path_has_only_wide_accesses(kernels, kernel, loads, stores, target):
    """Loads all four tensors and stores all but the gradient; a thread has four elements, or eight
    if no fp32 is written."""
    ptx = kernels[f"{kernel}.{target}"]["text"]
    block = accesses(main_path(ptx))
    assert [size for _, kind, size in block if kind == "ld"] == loads
    assert [size for _, kind, size in block if kind == "st"] == stores
    assert not any(predicated for predicated, _, _ in block)

    assert "shared" not in main_path(ptx)
    # The accesses outside the main path are masked accesses to the rest of a chunk, and reads of
    # the tables.
    rest = [size for predicated, _, size in accesses(ptx) if not predicated]
    table = sorted(rest)[: len(rest) - len(block)]
    assert set(table) == {4, 8}
    averaged = 2 if kernel == "ema-fp32" else 0
    assert table.count(4) == 1 + kernels[f"{kernel}.{target}"]["scalars"] + averaged


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("kernel", "without"),
    [
        ("changes-fp32", "adamw-fp32"),
        ("changes-bf16", "adamw-bf16"),
        ("changes-mx8", "adamw-mx8-split8"),
    ],
)
def test_a_record_of_changes_adds_two_accesses_of_four_bytes(kernels, kernel, without, target):
    """A word of the record is read and written only if one of its 32 weights has changed."""
    recorded = main_path(kernels[f"{kernel}.{target}"]["text"])
    plain = main_path(kernels[f"{without}.{target}"]["text"])
    added = Counter(accesses(recorded)) - Counter(accesses(plain))
    assert added == Counter({(True, "ld", 4): 1, (True, "st", 4): 1})
    # The bits of a word are in eight lanes of a warp: they are joined by shuffles alone.
    assert recorded.count("bar.sync") == plain.count("bar.sync")
    assert recorded.count(".shared") == plain.count(".shared")


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [
        ("adamw-mx8", [8, 8, 16, 16], [8, 8, 16]),
        ("adamw-mx8-split8", [8, 8, 8, 16, 16], [8, 8, 8, 16]),
        ("adamw-mx8-fp32", [4, 4, 16, 16], [4, 4, 16]),
        ("adamw-mx4", [4, 4, 16, 16], [4, 4, 16]),
        ("adamw-split16", [16, 16, 16, 16, 16], [16, 16, 16, 16]),
    ],
)
def test_formats_have_wide_accesses_and_shuffled_maxima(kernels, kernel, loads, stores, target):
    """Accesses eight elements per thread if no fp32 is written, and one byte per scale."""
    block = main_path(kernels[f"{kernel}.{target}"]["text"])
    found = accesses(block)
    for kind, expected in (("ld", loads), ("st", stores)):
        assert sorted(size for p, k, size in found if k == kind and not p) == expected
        scales = [size for p, k, size in found if k == kind and p]
        assert scales == ([1, 1] if kernel in EIGHT_BITS else [])
    assert not re.search(r"shared|bar\.sync", block)
    # A block of 32 is spread over four or eight threads, so its maximum takes two or three shuffles
    # for each of two states. mx4 also needs the minimum of the roots.
    exchanges = {"adamw-mx8-fp32": 6, "adamw-mx4": 6, "adamw-split16": 0}.get(kernel, 4)
    assert len(re.findall(r"\bshfl\.sync", block)) == exchanges


@pytest.mark.parametrize("target", NVIDIA)
def test_machine_code_has_the_wide_accesses_of_the_main_path(kernels, target):
    sass = kernels[f"adamw-fp32.{target}"]["sass"]
    assert len(re.findall(r"\bLDG\.E\S*\.128\b", sass)) == 4
    assert len(re.findall(r"\bSTG\.E\S*\.128\b", sass)) == 3


def test_the_main_path_on_amd_has_wide_accesses_too(kernels):
    text = kernels["adamw-fp32.gfx942"]["text"]
    assert len(re.findall(r"\bglobal_load_dwordx4\b", text)) == 4
    assert len(re.findall(r"\bglobal_store_dwordx4\b", text)) == 3
    # The tables are read with scalar instructions, so these four loads read the tensors.
    text = kernels["adamw-bf16.gfx942"]["text"]
    assert len(re.findall(r"\bglobal_load_dwordx4\b", text)) == 4
    assert len(re.findall(r"\bglobal_store_dwordx4\b", text)) == 3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_registers_and_spills(kernels, kernel, target):
    found = kernels[f"{kernel}.{target}"]
    if (kernel, target) == ("changes-mx8", "sm_100"):
        # Two words are spilled at the limit of 128 registers; without it, one program fits.
        assert found["spilled"] == 0
        assert found["stack"] <= 8
    else:
        assert (found["spilled"], found["stack"]) == (0, 0)
        assert not re.search(r"\b(LDL|STL)\b", found.get("sass", ""))
    most = MAX_REGISTERS if target in NVIDIA else MAX_REGISTERS_AMD
    assert 0 < found["registers"] <= most[kernel]


@pytest.mark.parametrize(
    "name",
    [f"{k}.{t}" for t in NVIDIA for k in ("adamw-fp32", "adamw-mx8", "adamw-mx4")]
    + [f"{k}.sm_90" for k in EVERY],
)
def test_arithmetic_on_nvidia(kernels, name):
    """Outside of the assembly for roots and quotients, which is tested for itself, the PTX has no
    fused operations, no flushing to zero and no approximations."""
    found = kernels[name]["text"]
    assembly, text = "".join(INLINE.findall(found)), INLINE.sub("", found)
    if not name.startswith(ROOTLESS):  # a custom rule uses the operations of Triton
        custom = name == "every-adabelief.sm_90"
        assert {"div.rn.f32", "sqrt.rn.f32"} <= {*(text if custom else assembly).split()}
    floats = re.findall(r"^\s*(?:@%p\d+ )?(\w[\w.]*\.f32[\w.]*)", text, re.MULTILINE)
    used = {op.removesuffix("x2") for op in floats}
    expected = {"mul.rn.f32", "add.rn.f32"}
    if not name.startswith("every-muon"):
        expected.add("sub.rn.f32")
    assert expected <= used
    # The other instructions are comparisons, selections, absolute values, conversions from and to
    # fp16, and, in mx4, conversions between the ratios and integers.
    others = used - expected - {"div.rn.f32", "sqrt.rn.f32"}
    others = {op for op in others if not op.startswith(("setp.", "selp."))}
    if name.startswith("adamw-mx4"):
        others -= {"cvt.rzi.s32.f32", "cvt.rn.f32.u32"}
    assert others <= {"abs.f32", "cvt.f32.f16", "cvt.rn.f16.f32", "cvt.rn.f16x2.f32"}
    assert not re.search(r"\b(fma|mad)\.\w*\.?f32|\.ftz|\.approx", text)


@pytest.mark.parametrize(
    "name", [f"{k}.{t}" for t in NVIDIA for k in FP32_KERNELS] + [f"{k}.sm_90" for k in EVERY]
)
def test_ptxas_contracts_nothing(kernels, name):
    """The machine code has every multiplication and addition of the PTX."""
    text, sass = kernels[name]["text"], kernels[name]["sass"]
    ptx = Counter(re.findall(r"\b(?:mul|add|sub|div|sqrt)\.rn\.f32(?:x2)?\b", text))
    machine = Counter(re.findall(r"\b(?:FMUL|FADD|FFMA)2?\b", sass))
    if name.endswith(".sm_100") and CONTRACTS.get(_version()):
        assert machine["FFMA2"] > 0, "the table CONTRACTS in backends/triton.py is wrong"
        pytest.skip("this version of Triton contracts pairs there, and the backend refuses it")
    assert machine["FFMA2"] == 0
    # ptxas expands a square root to 2 FMUL and 2 FFMA and a division to 5 FFMA, and adds
    # subroutines with 15 FFMA for arguments near the ends of the range (ptxas 12.8, 12.9, 13.1 and
    # 13.3).
    roots, divisions = ptx["sqrt.rn.f32"], ptx["div.rn.f32"]
    subroutines = 15 if roots or divisions else 0
    fused = len(re.findall(r"\bfma\.rn\.f32\b", "".join(INLINE.findall(text))))
    assert machine["FFMA"] <= fused + 2 * roots + 5 * divisions + subroutines
    # Counted per element, because ptxas may split a pair. FADD also computes absolute values, so
    # there may be more FADD than additions.
    products = ptx["mul.rn.f32"] + 2 * ptx["mul.rn.f32x2"]
    assert machine["FMUL"] + 2 * machine["FMUL2"] >= products + 2 * roots
    sums = ptx["add.rn.f32"] + ptx["sub.rn.f32"] + 2 * (ptx["add.rn.f32x2"] + ptx["sub.rn.f32x2"])
    assert machine["FADD"] + 2 * machine["FADD2"] >= sums


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("adamw-fp32", 38),
        ("adamw-split16", 65),
        ("adamw-mx8-split8", 92.5),
        ("adamw-mx4", 115),
    ],
)
def test_instructions_per_element_do_not_grow(kernels, kernel, most):
    """On sm_90; `python -m tests.triton_code` prints them. A thread has one branch for the operands
    of each four elements, or two in mx4 and one for the ratios, and one at the end of the loop."""
    elements = 4 if kernel == "adamw-fp32" else 8
    path = triton_code.main_loop(kernels[f"{kernel}.sm_90"]["sass"])
    assert len(path) / elements <= most
    branches = [line for line in path if "BRA" in line]
    pieces = 3 if kernel == "adamw-mx4" else 1
    assert len(branches) == 1 + elements // 4 * pieces


@pytest.mark.parametrize("kernel", ["adamw-fp32", *EVERY])
def test_arithmetic_on_amd(kernels, kernel):
    triton = pytest.importorskip("triton")
    if kernel not in ROOTLESS and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 writes the root for AMD out itself, with fma: see docs/triton.md")
    found = kernels[f"{kernel}.gfx942"]
    llir, text = found["llir"], found["text"]
    # The LLVM IR has no fused operations and no flags that allow contraction or approximation.
    assert not re.search(r"llvm\.(fma|fmuladd)|!fpmath|unsafe-fp-math", llir)
    assert not re.search(r"\bf(?:add|sub|mul|div)\s+(?:fast|contract|arcp|afn|reassoc)\b", llir)
    assert re.search(r"\.amdhsa_float_round_mode_32 0\b", text)
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text)
    if kernel not in ROOTLESS:
        # The last instruction of a correctly rounded division.
        assert "v_div_fixup_f32" in text
        assert "llvm.sqrt" in llir


@pytest.mark.parametrize("target", NVIDIA)
def test_the_main_path_that_zeroes_averages_and_measures(kernels, target):
    """With zeroing, averages and telemetry, the main path also writes the gradient, updates the
    average and adds its sums without communication between threads."""
    block = main_path(kernels[f"extras-bf16.{target}"]["text"])
    found = accesses(block)
    assert [size for _, kind, size in found if kind == "ld"] == [8, 8, 8, 8, 16]
    assert [size for _, kind, size in found if kind == "st"] == [16, 8, 8, 8, 8]
    assert not re.search(r"shared|shfl|bar\.sync", block)
    # Three sums for one group of elements.
    assert block.count("add.rn.f64") == 3


# All float64 instructions that may occur besides comparisons: arithmetic, conversions, selections.
FLOAT64 = {"mul.rn.f64", "add.rn.f64", "sub.rn.f64", "div.rn.f64", "sqrt.rn.f64", "selp.f64"}
FLOAT64 |= {"cvt.f64.f32", "cvt.rn.f32.f64", "cvt.rn.f64.s64", "cvt.rn.f64.u64", "cvt.rn.f64.u32"}


@pytest.mark.parametrize(
    "name", [f"{k}.sm_90" for k in SMALL] + [f"{k}.{t}" for k in SMALL[:2] for t in NVIDIA[::2]]
)
def test_float64_on_nvidia(kernels, name):
    """No contraction: all fused operations belong to ptxas' expansions of roots and divisions."""
    text, sass = kernels[name]["text"], kernels[name]["sass"]
    used = set(re.findall(r"^\s*(?:@!?%p\d+ )?(\w[\w.]*\.f64[\w.]*)", text, re.MULTILINE))
    used = {op for op in used if not op.startswith("setp.")}
    assert {"cvt.f64.f32" if name.startswith("judge") else "cvt.rn.f32.f64"} <= used <= FLOAT64
    assert not re.search(r"\b(fma|mad)\.\w*\.?f64|\.ftz|\.approx", text)
    # ptxas uses DFMA to expand roots and divisions. Without these, any DFMA is a contraction.
    if not {"div.rn.f64", "sqrt.rn.f64"} & used:
        assert "DFMA" not in sass
    for op, ptx_op in (("DADD", r"(?:add|sub)\.rn\.f64"), ("DMUL", r"mul\.rn\.f64")):
        assert len(re.findall(rf"\b{op}\b", sass)) >= len(re.findall(rf"\b{ptx_op}\b", text))


@pytest.mark.parametrize("kernel", SMALL)
def test_float64_on_amd(kernels, kernel):
    llir, text = (kernels[f"{kernel}.gfx942"][name] for name in ("llir", "text"))
    assert not re.search(r"llvm\.(fma|fmuladd)|!fpmath|unsafe-fp-math", llir)
    assert not re.search(r"\bf(?:add|sub|mul|div)\s+(?:fast|contract|arcp|afn|reassoc)\b", llir)
    assert re.search(r"\.amdhsa_float_round_mode_16_64 0\b", text)
    assert re.search(r"\.amdhsa_float_denorm_mode_16_64 3\b", text)
    if not re.search(r"fdiv double|llvm\.sqrt\.f64", llir):
        assert not re.search(r"v_fmac?_f64", text)


@pytest.mark.parametrize("target", NVIDIA)
def test_the_norm_reads_16_bytes_at_a_time(kernels, target):
    """A thread makes four accesses in each of three formats, and the program writes three
    numbers."""
    text = kernels[f"norm.{target}"]["text"]
    found = accesses(text)
    assert [(p, size) for p, kind, size in found if kind == "ld"].count((False, 16)) == 3 * 4
    assert [size for _, kind, size in found if kind == "st"] == [8, 8, 8]
    blocks = re.split(r"^\$L__BB\w+:.*$", text, flags=re.MULTILINE)
    loops = [block for block in blocks if (False, "ld", 16) in accesses(block)]
    # All elements of a group are in one thread.
    assert not any(re.search(r"shared|shfl|bar\.sync", block) for block in loops)
    # Float64 is used once per group, for two operations and a conversion, and in the final sums.
    assert max(block.count("add.rn.f64") for block in loops) == 4
    assert sum(len(re.findall(r"\.f64\.f32", block)) for block in loops) == 3 * 4


def test_the_norm_on_amd_reads_16_bytes_at_a_time(kernels):
    """A thread makes two accesses; a program has twice as many threads as on NVIDIA."""
    text = kernels["norm.gfx942"]["text"]
    assert len(re.findall(r"\bglobal_load_dwordx4\b", text)) == 3 * 2


def test_numbers_that_change_compile_nothing(tmp_path):
    """A schedule and other parameter lists compile nothing new.

    50 steps of a schedule, then other lists, compile two kernels: one derives the hyperparameters,
    one is the sweep. Each is launched once per step. Norms compile two kernels for all lists and
    dtypes, with two launches each. A step with clipping adds these, the kernel of the verdict, and
    another kernel that derives hyperparameters.
    """
    counts = [
        tuple(map(int, line.split()))
        for line in run_compiled("triton_schedule", tmp_path).splitlines()
    ]
    assert counts == [(2, 100), (2, 118), (3, 124), (7, 139), (7, 149)]
