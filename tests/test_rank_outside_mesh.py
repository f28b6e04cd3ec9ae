"""Parameters that are sharded over a mesh without the rank that steps them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .support.scripts import run_script

SCRIPT = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import onepass

dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
mesh = DeviceMesh("cpu", [0, 1])
for name in ("SGD", "AdamW", "Muon"):
    for placement in (Shard(0), Replicate()):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [placement]))
        param.grad = distribute_tensor(torch.ones(4, 4), mesh, [placement])
        try:  # Muon refuses when it is created
            getattr(onepass, name)([param], lr=0.1).step()
            print(name, placement, "steps")
        except ValueError as error:
            print(name, placement, "without this rank" in str(error) and "rank 2" in str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_a_sharded_parameter_is_refused_with_the_reason(tmp_path: Path) -> None:
    script = tmp_path / "outside.py"
    script.write_text(SCRIPT)
    result = run_script(script, tmp_path, threads=1)
    assert result.returncode == 0, result.stderr
    sharded = ["SGD S(0) True", "AdamW S(0) True", "Muon S(0) True"]
    # A replica on other ranks is an empty tensor here, which Muon cannot orthogonalise.
    whole = ["SGD R steps", "AdamW R steps", "Muon R True"]
    found = result.stdout.replace("Shard(dim=0)", "S(0)").replace("Replicate()", "R")
    assert sorted(found.splitlines()) == sorted(sharded + whole)
