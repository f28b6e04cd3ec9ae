"""The rungs of the kernel ladders come to the same weights. No time."""

from __future__ import annotations

import pytest
import torch

import onepass
from bench.ladder import rungs
from bench.ladder.__main__ import ODD, main
from onepass.benchmark import devices


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
    lines = rungs.lines(found, devices.DEVICES["cpu"], "fp32", 28 * ODD.numel)
    text = "\n".join(rungs.table(lines))
    assert [line["rung"] for line in lines] == [rung.name for rung in found]
    assert text.count("x |\n") + text.endswith("x |") == len(found) - 1


def test_rungs_of_the_gpu_in_the_interpreter():
    pytest.importorskip("triton")
    from onepass.backends import BACKENDS

    cpu = torch.device("cpu")
    if why := BACKENDS["triton"].unavailable(cpu):
        pytest.skip(why)
    from bench.ladder import gpu

    assert "onepass, triton" in [rung.name for rung in gpu.rungs(ODD, "cpu")]
    rungs.check(lambda: gpu.rungs(ODD, "cpu"), steps=1)


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
