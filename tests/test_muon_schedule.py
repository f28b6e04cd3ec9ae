"""The division of Muon's matrices into batches of products and rounds of the exchange."""

from __future__ import annotations

import pytest
import torch

from onepass.muon import exchange
from onepass.muon.batches import Direction, Directions, Settings, units_of
from onepass.muon.exchange import cost_of, owners_of, schedule_of
from onepass.muon.matrices import matrices_of
from onepass.muon.newton_schulz import elements
from onepass.muon.products import TorchProducts

CPU = torch.device("cpu")
GROUP = {"adjust_lr_fn": None}
SHAPES = [(64, 32), (7, 16, 16), (1, 9), (64, 32), (0, 4), (2, 16, 16), (40, 16, 16)] * 3


def directions(shapes, group=GROUP):
    params = [torch.empty(shape, device="meta") for shape in shapes]
    return [Direction(matrices_of(p, group, ""), group, tuple(p.shape), p.stride()) for p in params]


def settings(matrices=4, precision="fp32"):
    """A workspace for this number of matrices [64, 32], or a few more [16, 16]."""
    return Settings(precision, 4 * matrices * elements(64, 32), TorchProducts())


@pytest.mark.parametrize("matrices", [0, 1, 4, 100])
def test_batches_consist_of_whole_parameters(matrices):
    """A parameter with more matrices than a batch may have is divided into batches of its own."""
    found, given = directions(SHAPES), settings(matrices)
    units = units_of(found, given, CPU)
    assert sorted(i for unit in units for i in unit) == list(range(len(found)))
    made = Directions(found, given, CPU)
    assert made.memory[1].nbytes <= max(given.scratch, 4 * elements(64, 32))
    for unit in units:
        for i, tensor in enumerate(made.tensors):
            tensor.fill_(i in unit)
        batches = made.batches_of(set(unit))
        assert all(batch.x.all() for batch in batches)
        assert sum(batch.x.numel() for batch in batches) == sum(found[i].numel for i in unit)
        assert len(unit) == 1 or len(batches) <= 1
    equal = [unit for unit in units if found[unit[0]].shape == (64, 32)]
    assert len(equal) == -(-SHAPES.count((64, 32)) // max(1, matrices))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_matrix_is_in_one_round_of_its_owner(ranks, monkeypatch):
    monkeypatch.setattr(exchange, "ROUND_NUMEL", 1)
    found, given = directions(SHAPES), settings()
    rounds = schedule_of(found, ranks, given, CPU)
    assert 1 < len(rounds) <= exchange.MOST_ROUNDS
    owner = owners_of([cost_of(one.matrices) for one in found], ranks)
    for rank in range(ranks):
        own = [i for i in range(len(found)) if owner[i] == rank and found[i].numel]
        assert sorted(i for one in rounds for i in one[rank]) == own
        # No batch is divided between rounds.
        for unit in units_of([found[i] for i in own], given, CPU):
            assert sum({own[k] for k in unit} <= {*one[rank]} for one in rounds) == 1


def test_rounds_have_equal_work_and_a_least_size(monkeypatch):
    """The number of rounds depends on the elements per rank."""
    found = directions([(64, 64)] * 64)
    numel = 64 * 64 * 64
    for least, number in ((numel, 1), (numel // 2, 1), (numel // 8, 4), (1, exchange.MOST_ROUNDS)):
        monkeypatch.setattr(exchange, "ROUND_NUMEL", least)
        rounds = schedule_of(found, 2, settings(1), CPU)
        assert [[len(part) for part in one] for one in rounds] == [[32 // number] * 2] * number


def test_nothing_is_exchanged_without_elements():
    assert schedule_of(directions([(0, 4), (3, 0)]), 2, settings(), CPU) == []


def test_the_rounds_do_not_depend_on_the_cpu(monkeypatch):
    """Ranks whose CPUs convert bf16 directions to fp32 exchange the same matrices as others."""
    monkeypatch.setattr(exchange, "ROUND_NUMEL", 1)
    found, results, memory = directions(SHAPES), [], []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        given = settings(precision="bf16")
        results.append(schedule_of(found, 3, given, CPU))
        memory.append(Directions(found, given, CPU).memory[1].nbytes)
    assert results[0] == results[1]
    assert memory[1] < memory[0] <= given.scratch
