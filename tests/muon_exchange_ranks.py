"""Checks of the rounds in which Muon exchanges matrices, that several ranks run."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import onepass
from onepass.muon import exchange
from onepass.muon.batches import Settings
from onepass.muon.products import TorchProducts

from .zero_model import everywhere, mesh, whole

MATRICES = [
    ((50, 8), 0, {}),
    ((5, 6, 4), 0, {}),
    ((2, 6, 7), 2, {}),
    ((12, 5), 0, {"split": (3, 0)}),
    ((1, 9), 0, {}),
    ((50, 8), 0, {}),
    ((0, 4), 0, {}),
    ((5, 12), 0, {"split": (2, 1)}),
    ((5, 3, 2, 2), 0, {}),
]
"""Shape, sharded dimension and options of the group. Some shards are uneven or empty."""

SCRATCH = 8192
"""Bytes of workspace that divide the matrices into several batches."""


class Recorded(TorchProducts):
    """Appends "products" to a list for each batch; fails in the first batch if asked to."""

    def __init__(self, events, fails=False):
        self.events, self.fails = events, fails

    def normalize(self, *args, **kwargs):
        self.events.append("products")
        if self.fails:
            raise RuntimeError("out of memory")
        super().normalize(*args, **kwargs)


class Transfer:
    """The handle of an all-to-all, which appends to a list when it is waited for.

    Waiting is interrupted if ``interrupted`` is set.
    """

    def __init__(self, work, number, events, interrupted):
        self.work, self.number, self.events = work, number, events
        self.interrupted = interrupted

    def wait(self):
        self.events.append(f"wait {self.number}")
        self.work.wait()
        if self.interrupted:
            raise KeyboardInterrupt


def recorded_transfers(patch, events, interrupted=None):
    """Records the all-to-alls; returns the list of their handles.

    Waiting for the one with the number ``interrupted`` raises KeyboardInterrupt.
    """
    original, handles = dist.all_to_all_single, []

    def start(*args, **kwargs):
        assert kwargs["async_op"]
        number = len(handles)
        events.append(f"start {number}")
        work = original(*args, **kwargs)
        handles.append(Transfer(work, number, events, number == interrupted))
        return handles[-1]

    patch.setattr(dist, "all_to_all_single", start)
    return handles


def many_rounds(patch):
    """As many rounds as there are batches, up to the limit."""
    patch.setattr(exchange, "ROUND_NUMEL", 1)


def shared_muon(products=None, meshes=None):
    """Muon over DTensors of :data:`MATRICES`, on each of the meshes in turn."""
    meshes, groups = meshes or [mesh()], {}
    for i, (shape, dim, options) in enumerate(MATRICES):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        placed = distribute_tensor(value, meshes[i % len(meshes)], [Shard(dim)])
        group = groups.setdefault(tuple(options.items()), {"params": [], **options})
        group["params"].append(torch.nn.Parameter(placed))
    muon = onepass.Muon(list(groups.values()), 0.1)
    muon.products = Settings(None, SCRATCH, products or TorchProducts())
    return muon


def step(muon, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in muon.param_groups:
        for p in group["params"]:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    muon.step()


def rounds_of(muon):
    return [one for part in muon._plan._parts for one in part.directions._rounds]


def weights(muon):
    params = [p for group in muon.param_groups for p in group["params"]]
    return [whole(value) for p in params for value in (p, muon.state[p]["momentum_buffer"])]


def another_mesh(name, seconds=20):
    """A mesh of all ranks with a process group of its own.

    The name is needed because DTensor replaces meshes by equal ones.
    """
    ranks = list(range(dist.get_world_size()))
    group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=seconds))
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,))


def the_number_of_rounds_does_not_change_bits(directory):
    """Also with parameters on two meshes, each of which has an exchange of its own."""
    for meshes in (None, [mesh(), another_mesh("other")]):
        results, numbers = [], []
        for many in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if many:
                    many_rounds(patch)
                muon = shared_muon(meshes=meshes)
                for seed in range(2):
                    step(muon, seed)
                numbers.append(len(rounds_of(muon)))
                results.append(weights(muon))
        parts = 1 if meshes is None else 2
        assert numbers[0] == parts < numbers[1]
        assert len(set(everywhere(numbers[1]))) == 1
        assert all(map(torch.equal, *results))


def transfers_overlap_with_products(directory):
    """All arrivals start before the products; no product waits for a later arrival or a return."""
    events = []
    with pytest.MonkeyPatch.context() as patch:
        many_rounds(patch)
        muon = shared_muon(Recorded(events))
        recorded_transfers(patch, events)
        step(muon, 0)
    rounds = rounds_of(muon)
    n = len(rounds)
    expected = [f"start {k}" for k in range(n)]
    for k, one in enumerate(rounds):
        expected += [f"wait {k}", *["products"] * len(one.batches), f"start {n + k}"]
    expected += [f"wait {n + k}" for k in range(n)]
    assert events == expected
    assert "products" in expected[: expected.index("wait 2")]
    starts = [event for event in events if event.startswith("start")]
    assert everywhere(starts) == [starts] * dist.get_world_size()


def an_interrupt_leaves_no_transfer(directory):
    """All ranks are interrupted in their second round; they can go on from a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        many_rounds(patch)
        muon = shared_muon()
        step(muon, 0)
        saved, before, n = muon.state_dict(), weights(muon)[::2], len(rounds_of(muon))
        events = []
        handles = recorded_transfers(patch, events, interrupted=1)
        with pytest.raises(KeyboardInterrupt):
            step(muon, 1)
        assert len(handles) == n + 1  # all arrivals, and the return of the first round
        assert {f"wait {k}" for k in range(n + 1)} < {*events}
        assert all(handle.work.is_completed() for handle in handles)
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        muon.step()
    muon.load_state_dict(saved)
    assert all(map(torch.equal, weights(muon)[::2], before))
    step(muon, 2)
    assert not all(map(torch.equal, weights(muon)[::2], before))


def a_failure_of_one_rank_stops_all_ranks(directory):
    """The other ranks wait until the timeout of the process group and then refuse steps too."""
    fails = dist.get_rank() == 0
    with pytest.MonkeyPatch.context() as patch:
        many_rounds(patch)
        muon = shared_muon(Recorded([], fails), [another_mesh("short", seconds=3)])
        handles = recorded_transfers(patch, [])
        with pytest.raises(RuntimeError, match="out of memory" if fails else None):
            step(muon, 0)
        assert all(handle.work.is_completed() for handle in handles)
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        muon.step()
    dist.barrier()


SEVERAL = [
    the_number_of_rounds_does_not_change_bits,
    transfers_overlap_with_products,
    an_interrupt_leaves_no_transfer,
    a_failure_of_one_rank_stops_all_ranks,
]
"""Checks that need at least two ranks."""
