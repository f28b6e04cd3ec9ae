"""Muon with FSDP2 on several gloo processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from . import muon_exchange_ranks, muon_ranks, zero_ranks
from .support.thorough import THOROUGH

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def test_ranks(tmp_path):
    """Every check on 3 ranks and 1, and in `make test-all` on 2; these load a checkpoint of 3."""
    for world in (3, 2, 1) if THOROUGH else (3, 1):
        last = muon_ranks.save if world == 3 else muon_ranks.load
        directory = tmp_path / str(world)
        directory.mkdir()
        several = muon_exchange_ranks.SEVERAL if world > 1 else []
        found = zero_ranks.run(world, [*muon_ranks.EVERYWHERE, last, *several], directory)
        assert not any(found.values()), "\n".join(filter(None, found.values()))
