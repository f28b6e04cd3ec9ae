"""The machine code of csrc/cuda in the built library, which needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from onepass.rules import RULES

from . import cuda_code
from .cuda_code import LIBRARY, kernels
from .support.thorough import thorough
from .test_package import ROOT

WHY_NOT = cuda_code.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
all_kernels = pytest.mark.skipif(
    not WHY_NOT and cuda_code.is_sample(),
    reason="the library has a sample of the kernels: make -B setup KERNELS=all builds all",
)

# Registers per thread. A multiprocessor has 65,536 registers: with 80 per thread it holds 768
# threads, with 128 it holds 512, the smallest number in __launch_bounds__ (csrc/cuda/tuning.h). A
# thread of an fp32 AdamW step has 128 bytes of reads in flight, so 768 threads have 96 KiB, and in
# bf16 48 KiB. Bandwidth times latency on an H200 (4.8 TB/s over 132
# multiprocessors, about 800 ns) is 29 KiB.
MOST = 128


def architectures():
    return sorted({kernel.arch for kernel in kernels()})


def named(name):
    found = [kernel for kernel in kernels() if kernel.name == name]
    assert len(found) == len(architectures()), f"{name}: {[k.arch for k in found]}"
    return found


@all_kernels
def test_every_row_of_the_table_has_a_kernel():
    table = (ROOT / "csrc" / "cuda" / "combinations.h").read_text()
    rows = re.findall(r"^\s+COMBINATION\(k\w+, k\w+, k\w+\)", table, re.MULTILINE)
    names = {kernel.name for kernel in kernels()}
    for rule, flags in (("sgd", 2), ("adam", 0), ("adam", 1), ("lion", 1)):
        assert sum(
            n.startswith(f"{rule}-{flags} ") and n.count(" ") == 3 for n in names
        ) == 1 + len(rows)
    # SGD without momentum has no Nesterov momentum, which leaves 6 of its 8 flag combinations.
    for rule, flags in (("sgd", 6), ("adagrad", 4), ("rmsprop", 16), ("adam", 4), ("lion", 2)):
        assert sum(n.startswith(rule) and n.endswith(" fp32 fp32 fp32") for n in names) == flags
        assert f"{rule} any" in names
    assert {"sgd-2 formats", "adam-0 formats", "adam-1 formats", "lion-1 formats"} <= names


def test_every_rule_has_a_kernel_and_so_has_what_is_not_a_sweep():
    names = {kernel.name for kernel in kernels()}
    rules = {rule.name for rule in RULES.values()}
    assert {n.split("-")[0] for n in names if n.endswith(" fp32 fp32 fp32")} == rules
    assert {"adam any", "adam-1 formats"} <= names
    assert {"norm_chunks", "norm_total", "judge_step", "advance_rows"} <= names
    assert {"measure_skipped", "total_telemetry"} <= names


def test_no_kernel_spills_more_than_a_word():
    """On sm_90 a kernel may spill 8 bytes, stored and loaded once.

    The register limits are chosen for sm_90. They are tight on other architectures, where 64 bytes
    of stack are allowed.
    """
    for kernel in kernels():
        what = (kernel.name, kernel.arch)
        assert kernel.resources["LOCAL"] == 0, what
        if kernel.arch != "sm_90":
            assert kernel.resources["STACK"] <= 64, what
            continue
        assert kernel.resources["STACK"] <= 8, what
        if not kernel.instructions:
            continue
        spills = [op for op in kernel.opcodes.elements() if op.startswith(("LDL", "STL"))]
        assert len(spills) == kernel.resources["STACK"] // 4, what


def test_registers():
    for kernel in kernels():
        # Kernels for mixed lists have no register limit, because they would spill.
        most = 255 if kernel.name.endswith((" any", " formats")) else MOST
        assert kernel.resources["REG"] <= most, (kernel.name, kernel.arch)
    for name in ("adam-1 fp32 fp32 fp32", "adam-1 split16 bf16 bf16sr", "adam-1 split16 bf16 mx8"):
        assert [k.name for k in named(name) if k.resources["REG"] > 80] == []


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # Two vectors of four elements of the parameter, the gradient and each state.
        ("adam-1 fp32 fp32 fp32", 8, 6),
        ("lion-1 fp32 fp32 fp32", 6, 4),
        ("sgd-2 fp32 fp32 fp32", 6, 4),
        ("adagrad-0 fp32 fp32 fp32", 6, 4),
        ("rmsprop-0 fp32 fp32 fp32", 6, 4),
        # One vector of eight elements each.
        ("adam-1 bf16 bf16 bf16sr", 4, 3),
        ("adam-1 split16 bf16 bf16sr", 5, 4),
        pytest.param("lion-1 bf16 bf16 bf16sr", 3, 2, marks=all_kernels),
    ],
)
def test_the_main_path_reads_16_bytes_per_access_before_it_writes(name, loads, stores):
    """All reads of a round are 16 bytes wide, or 32, and precede its first write.

    The fast arithmetic ends in a vote of the warp. The exact arithmetic, which runs if the vote
    fails, handles one element at a time.
    """
    zeroed = 2 if "fp32 fp32 fp32" in name else 1
    for kernel in named(name):
        # On compute capability 10.0, the eight elements of an fp32 tensor are one access.
        share = 2 if zeroed == 2 and kernel.arch == "sm_100" else 1
        path = cuda_code.main_path(kernel)
        (vote,) = [i for i, line in enumerate(path) if cuda_code.opcode(line) == "VOTE.ALL"]
        reads = [i for i, line in enumerate(path) if cuda_code.is_wide(line, "LDG")]
        assert len(reads) == loads // share
        writes = [i for i, line in enumerate(path) if cuda_code.is_wide(line, "STG")]
        assert reads[-1] < vote < writes[0]
        # The zeros are written last, if the option is set. A sweep that writes to gradients still
        # being read takes twice as long. On compute capability 10.0, the path may branch around
        # them.
        zeros = [path[i].endswith(", RZ") for i in writes]
        first = stores // share
        assert zeros[:first] == [False] * first
        assert zeros[first:] == [True] * (zeroed // share) or (
            kernel.arch == "sm_100" and not zeros[first:]
        )
        assert all(path[i].startswith("@") for i in writes[first:])
        between = [cuda_code.opcode(line) for line in path[reads[0] : reads[-1] + 1]]
        assert not [
            op for op in between if re.match(r"(LD|ST)G?\.", op) and not op.endswith(("128", "256"))
        ]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("adam-1 fp32 fp32 fp32", 37.5),
        ("adam-1 split16 bf16 bf16sr", 57),
        ("adam-1 split16 bf16 mx8", 72),
        ("adam-1 split8 bf16 mx8", 74),
        ("adam-1 bf16sr bf16 mx4", 92.5),
        ("adam-1 fp32 fp32 dynamic8", 79),
        ("adam-1 bf16 bf16 dynamic8", 83.5),
    ],
)
def test_instructions_per_element_do_not_grow(name, most):
    """On sm_90, 8-bit and 4-bit states are limited by instructions and not by memory."""
    for kernel in named(name):
        if kernel.arch == "sm_90":
            assert len(cuda_code.main_path(kernel)) / 8 <= most


def test_the_arithmetic_starts_after_all_loads_and_prefetches():
    """A round issues its loads and the prefetches of the next round before it uses what it loaded.

    A load behind the first use waits for memory a second time. A prefetch behind most of the
    arithmetic has little of the round left to fetch its data.
    """
    read = set()
    for kernel in kernels():
        if not kernel.instructions or not re.fullmatch(r"\w+-\d+ \S+ \S+ \S+", kernel.name):
            continue
        path = cuda_code.main_path(kernel)
        ops = [cuda_code.opcode(line) for line in path]
        read.add(kernel.name)
        ahead = [i for i, op in enumerate(ops) if op.startswith("CCTL.E.PF2")]
        loads = [i for i, op in enumerate(ops[: ops.index("VOTE.ALL")]) if op.startswith("LDG")]
        # A prefetch for each load, or for the scales of one tensor.
        assert 0 < len(ahead) <= len(loads), kernel.name
        assert max(loads + ahead) < cuda_code.first_use(path), (kernel.name, kernel.arch)
    assert {"adam-1 fp32 fp32 fp32", "adam-1 split8 bf16 mx8"} <= read


def test_no_access_uses_generic_addresses():
    for kernel in kernels():
        generic = [op for op in kernel.opcodes if re.match(r"(LD|ST)\.", op)]
        assert not generic, (kernel.name, generic)


def test_no_formula_is_contracted():
    """Only square roots and divisions contain fused multiply-adds.

    SGD and Lion have neither operation, so they have no FFMA, except to encode dynamic8. In other
    kernels each root and each division adds a fixed number. Any other count means that a formula
    was contracted.
    """
    seen = {}
    for kernel in kernels():
        count = {"FFMA": 0, "MUFU.RCP": 0, "MUFU.RSQ": 0}
        for op, number in kernel.opcodes.items():
            for start in count:
                count[start] += number if op.split(".FTZ")[0].startswith(start) else 0
        # Pairs of compute capability 10.0 have another number, which the next test checks.
        pairs = sum(number for op, number in kernel.opcodes.items() if op.startswith("FFMA2"))
        count["FFMA"] -= pairs
        rule = kernel.name.split("-")[0].split()[0]
        if rule in ("sgd", "lion", "norm_chunks", "norm_total") and not kernel.name.endswith(
            (" any", " formats", " dynamic8")
        ):
            assert count["FFMA"] == 0, kernel.name
        elif not kernel.name.endswith((" any", " formats")):
            key = (kernel.arch, count["MUFU.RCP"], count["MUFU.RSQ"], pairs)
            seen.setdefault(key, {}).setdefault(count["FFMA"], []).append(kernel.name)
    for key, counts in seen.items():
        assert len(counts) == 1, (key, {n: names[:3] for n, names in counts.items()})


@thorough
def test_pairs_are_not_contracted(tmp_path, monkeypatch):
    """On sm_100, AdamW has 6 additions per pair of elements; a contracted one would be missing.

    The multiply-adds are 10 products, 3 changes of sign, and those of the root (2) and of the
    quotient (4).
    """
    most = {"fp32 fp32 fp32": 26, "split16 bf16 bf16sr": 46.5, "split16 bf16 mx8": 63}
    most |= {"split8 bf16 mx8": 65, "bf16sr bf16 mx4": 89.5}
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path / "pairs.sm_100.cubin"
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr"]
    command += ["-arch=sm_100", "-DONEPASS_TUNING"]
    source = ROOT / "csrc" / "generated" / "cuda" / "sweep_adam.cu"
    subprocess.run([*command, "-cubin", source, "-o", cubin], check=True)
    monkeypatch.setattr(cuda_code, "LIBRARY", cubin)
    found = {kernel.name: kernel for kernel in cuda_code.kernels.__wrapped__()}
    assert found.keys() == {f"adam-1 {formats}" for formats in most}
    for formats, limit in most.items():
        kernel = found[f"adam-1 {formats}"]
        assert kernel.resources["STACK"] == 0, formats
        path = [cuda_code.opcode(line) for line in cuda_code.main_path(kernel)]
        assert len(path) / 8 <= limit, formats
        pairs = Counter(
            op.split(".")[0] for op in path if op.startswith(("FADD2", "FMUL2", "FFMA2"))
        )
        assert pairs == {"FADD2": 6 * 4, "FFMA2": 19 * 4}, formats


# --- the library -----------------------------------------------------------------------------


def undefined():
    command = ["nm", "-D", "--undefined-only", "--demangle", str(LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_library_uses_only_the_stable_abi():
    names = [name for _, name in undefined()]
    assert "aoti_torch_get_current_cuda_stream" in names
    assert [n for n in names if re.search(r"\b(at|c10|caffe2|torch)::", n)] == []
    assert [n for n in names if re.match(r"_?Py", n)] == []
    # cudart is linked statically and loads the driver at the first call.
    others = [name for kind, name in undefined() if "@" not in name and kind not in "wv"]
    assert [n for n in others if not n.startswith(("aoti_torch_", "torch_"))] == []


def test_the_library_needs_only_torch_and_the_system():
    text = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed)
    assert [n for n in needed if "cuda" in n] == ["libtorch_cuda.so"]
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_the_library_loads_where_torch_has_a_cuda_part(tmp_path):
    """A stub that only defines aoti_torch_get_current_cuda_stream replaces torch's CUDA library.

    Afterwards all ops are registered for CUDA.
    """
    stub = tmp_path / "libtorch_cuda.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    command = ["g++", "-shared", "-fPIC", "-xc++", "-", f"-Wl,-soname,{stub.name}", "-o", stub]
    subprocess.run(command, input=source, check=True, text=True)
    code = (
        "import ctypes, torch, onepass\n"
        f"if torch.version.cuda is None: ctypes.CDLL({str(stub)!r})\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "ops = ('sweep_', 'make_plan', 'refresh', 'run', 'norm', 'free_plan', 'judge', 'advance')\n"
        "print([name for name in ops if not has('onepass::' + name, 'CUDA')])\n"
        "print(torch.ops.onepass.cuda_refusal())\n"
        "print(torch.cuda.is_available(), torch.ops.onepass.cuda_support(0)[0])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert lines[:1] == ["[]"], found.stderr
    assert ("KERNELS=all" in lines[1]) == cuda_code.is_sample()
    # Without a driver the library returns the reason and raises nothing.
    if lines[2].startswith("False"):
        assert re.search(r"NVIDIA driver|do not load on cuda:0 \(cudaErrorNoDevice\)", lines[2])
