"""The ring of bulk copies of the CUDA sweep, and the mistakes that the stand-in finds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.tuning_variants import RINGS

from . import cuda_code
from .support.thorough import thorough
from .test_package import ROOT

HERE = Path(__file__).parent
MISTAKES = {
    "none": "0 wrong",
    "misaligned": "0 wrong",
    "no wait": "[1-9][0-9]* wrong",
    "early release": "[1-9][0-9]* wrong",
    "no release": "threads wait for others",
    "ends early": "a block ends before its bulk copies",
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=thorough)])
def program(request, tmp_path_factory):
    """The program of ring_faults.cpp, with a ring of two or three stages."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ on PATH")
    shim, built = HERE / "cuda_shim", tmp_path_factory.mktemp("ring") / "ring_faults"
    sources = [HERE / "ring_faults.cpp", shim / "shim.cpp", shim / "bulk_copy.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-I", shim]
    command += [f"-DONEPASS_RING={request.param}", *sources, "-o", built]
    subprocess.run(command, check=True)
    return built


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_finds_a_missing_wait_or_release(program, mistake):
    found = subprocess.run([program, mistake], capture_output=True, text=True)
    told = found.stdout + found.stderr
    assert (found.returncode == 0) == (mistake in ("none", "misaligned")), told
    assert re.search(MISTAKES[mistake], told), told


# The instructions of the main path per element, without those of the refills.
MOST = {
    "adam-1 fp32 fp32 fp32": 38.5,
    "adam-1 split16 bf16 bf16sr": 58,
    "adam-1 split16 bf16 mx8": 72.5,
    "adam-1 split8 bf16 mx8": 74.5,
    "adam-1 bf16sr bf16 mx4": 93.5,
}


@thorough
def test_machine_code_of_a_ring(tmp_path, monkeypatch):
    """On sm_90, each round starts with the bulk copies of a later one and spills nothing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or cuda_code.cuobjdump() is None:
        pytest.skip("nvcc or cuobjdump is not there")
    cubin = tmp_path / "ring.cubin"
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-arch=sm_90"]
    command += [f"-D{name}" for name in RINGS[0].defines.split()]
    source = ROOT / "csrc" / "generated" / "cuda" / "sweep_adam.cu"
    subprocess.run([*command, "-cubin", source, "-o", cubin], check=True)
    monkeypatch.setattr(cuda_code, "LIBRARY", cubin)
    found = {kernel.name: kernel for kernel in cuda_code.kernels.__wrapped__()}
    assert found.keys() == MOST.keys()
    for name, kernel in found.items():
        assert kernel.resources["STACK"] == 0, name
        path = cuda_code.main_path(kernel)
        assert len(path) / 8 <= MOST[name], name
        head = kernel.instructions.index(path[0])
        refill = cuda_code.refill(kernel, head)
        ops = [cuda_code.opcode(line) for line in kernel.instructions]
        assert any(op.startswith("UBLKCP") for op in ops[refill.start : refill.stop]), name
        assert not [op for op in ops[head : refill.stop] if re.match(r"F(ADD|MUL|FMA)|MUFU", op)]
        assert not [op for op in map(cuda_code.opcode, path) if op.startswith(("LDG", "CCTL"))]
