"""Optimizers with torch.distributed: several gloo processes on this machine.

The checks are in zero_checks.py, zero_checkpoints.py, zero_deltas.py, zero_memory.py and
zero_reading.py. All
checks for one number of ranks run in one set of processes. Four ranks run first, because the others
load the checkpoints that these save. `make test` runs the checks on one and two ranks only;
test_random_ranks.py runs on three.
"""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from . import zero_checkpoints, zero_checks, zero_deltas, zero_memory, zero_ranks, zero_reading
from .support.thorough import THOROUGH, thorough

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)
CHECKS = [
    *zero_checks.EVERYWHERE,
    *zero_checkpoints.EVERYWHERE,
    *zero_memory.EVERYWHERE,
    *zero_reading.EVERYWHERE,
    *zero_deltas.EVERYWHERE,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs all checks for a number of ranks when the first of them is requested."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    found = {}

    def of(world):
        if world not in found:
            if world != 4:
                of(4)
            checks = CHECKS
            if world == 4:
                checks = [zero_checkpoints.save, *CHECKS] if THOROUGH else [zero_checkpoints.save]
            directory = tmp_path_factory.mktemp(f"ranks{world}")
            found[world] = zero_ranks.run(world, checks, directory, checkpoints=checkpoints)
        return found[world]

    return of


@pytest.mark.parametrize(
    "world", [pytest.param(4, marks=thorough), pytest.param(3, marks=thorough), 2, 1]
)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_ranks(ranks, world, check):
    assert ranks(4)["save"] is None, ranks(4)["save"]
    why = ranks(world)[check]
    assert why is None, why


def test_killed_rank_ends_the_others_and_its_checkpoint_loads(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    start = time.monotonic()
    check = zero_checkpoints.a_rank_dies
    found = zero_ranks.run(3, [check], tmp_path / "first", checkpoints=tmp_path)
    assert time.monotonic() - start < zero_ranks.PATIENCE / 4
    told = found[check.__name__]
    assert told.count("heard of it in time") == 2
    assert "rank 1 of 3: no result (exit code -9)" in told
    check = zero_checkpoints.the_last_checkpoint_loads
    found = zero_ranks.run(2, [check], tmp_path / "second", checkpoints=tmp_path)
    assert found[check.__name__] is None, found[check.__name__]
