"""All rungs of the kernel ladders compute the same weights. Times are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import onepass
from bench import results
from bench.ladder import rungs
from bench.ladder.__main__ import ODD, main
from onepass_tools.benchmark import devices

COMPILE = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.ladder import gpu, kernels

def look(kernel, signature, constants):
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": 8, **gpu.NO_FUSION}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))
    return {
        "vectors": count(r"ld[.]global[^;]*[.]v4"),
        "stored": count(r"st[.]global[^;]*[.]v4"),
        "marked": "evict_first" in ptx,
        "fused": count(r"fma[.]rn[.]f32"),
    }

tensors = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "row"), "*fp32")
found = [look(kernels.one_tensor, {**tensors, "numel": "i32"}, {"BLOCK": 256})]
for v in gpu.VARIANTS:
    constants = {"BLOCK": v.block, "VECTORS": v.vectors, "EVICT": v.evict}
    constants |= {"PERSISTENT": v.persistent, "WHOLE": gpu.CHUNK, "COLUMNS": gpu.COLUMNS}
    signature = {"table": "*i64", "row": "*fp32", "chunks": "i32"}
    found.append(look(kernels.whole_list, signature, constants))
print(json.dumps(found))
"""


def test_rungs_of_the_cpu(tmp_path):
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    from bench.ladder import cpu

    threads, isa = torch.get_num_threads(), onepass.ops.cpu_isa()
    try:
        rungs.check(lambda: cpu.list_rungs(ODD))
        found = cpu.list_rungs(ODD)
        rungs.measure(found, devices.DEVICES["cpu"], 2)
    finally:
        cpu.restore()
    assert (torch.get_num_threads(), onepass.ops.cpu_isa()) == (threads, isa)
    lines = rungs.lines(results.environment(), found, "fp32", 28 * ODD.numel)
    text = "\n".join(rungs.table(lines))
    assert [line["rung"] for line in lines] == [rung.name for rung in found]
    assert text.count("x |\n") + text.endswith("x |") == len(found) - 1


def test_rungs_of_the_gpu_in_the_interpreter():
    pytest.importorskip("triton")
    from onepass.engine.backends import BACKENDS

    cpu = torch.device("cpu")
    if why := BACKENDS["triton"].unavailable(cpu):
        pytest.skip(why)
    from bench.ladder import gpu

    assert "onepass, triton" in [rung.name for rung in gpu.rungs(ODD, "cpu")]
    rungs.check(lambda: gpu.rungs(ODD, "cpu"), steps=1)


def test_rungs_of_the_gpu_compile_to_the_expected_accesses():
    """Counts instructions in PTX for sm_90.

    A new process is used because the interpreter is on here.
    """
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout)
    assert first == {"vectors": 0, "stored": 0, "marked": False, "fused": 0}
    from bench.ladder.gpu import VARIANTS

    for variant, found in zip(VARIANTS, others, strict=True):
        rounds = variant.block // 1024 if variant.vectors else 0  # of 256 threads by 4 elements
        assert found["vectors"] == 4 * rounds, variant.name
        assert found["stored"] == 3 * rounds, variant.name
        assert found["marked"] == bool(variant.evict), variant.name
        assert found["fused"] == 0, variant.name


def test_a_rung_that_is_wrong_is_named():
    def make(scale=1.0):
        weight = torch.zeros(3)
        right = rungs.Rung("right", lambda: weight.add_(1.0), [weight])
        other = torch.zeros(3)
        return [right, rungs.Rung("wrong", lambda: other.add_(1.0 + 2**-20), [other])]

    with pytest.raises(RuntimeError, match="wrong: weights are"):
        rungs.check(make)


def test_usage(capsys):
    for arguments in (["--samples", "0"], ["--only", "nothing of the kind"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
