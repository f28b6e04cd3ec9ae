"""Shared fixtures, and the order in which the test files run."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from itertools import count

import pytest

# Two workers with two threads each share the cores of a small machine. By default, OpenMP's threads
# spin while they wait, which takes as much time as the tests themselves. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton reads TRITON_INTERPRET when it is first imported, so it is set before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of pytest-xdist have the width of the terminal in COLUMNS, for which tables are made
# narrower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)

import onepass
from onepass.paging import pager

from .paging_links import RandomLink
from .support.interpreter import speed_up
from .support.targets import Target, instruction_sets, stand_in

speed_up()

# The slowest files. The two workers of `make test` take files in this order as they become free. A
# slow file that started last would leave one worker idle.
SLOWEST = (
    "test_bits",
    "test_zero",
    "test_triton_compile",
    "test_muon_ranks",
    "test_format_tracking",
    "test_random_ranks",
    "test_step",
    "test_memory_cli",
    "test_whole_steps",
    "test_session",
    "test_prologue",
    "test_sweep_extras",
    "test_conformance",
    "test_bench",
    "test_compile",
    "test_cuda_code",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the slowest files first and the others in their usual order.

    Without a GPU, each test that needs one is skipped once instead of once per row: 1,600 skipped
    rows would take 10 s.
    """
    turn = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))
    if torch.cuda.is_available():
        return
    shown: set[str] = set()
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        again = item.get_closest_marker("gpu") is not None and test in shown
        shown |= {test} if item.get_closest_marker("gpu") else set()
        (left_out if again else chosen).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Exempts everything that exists before the tests of a file from garbage collection.

    torch, Triton and 8,000 tests are millions of objects: a collection would take 0.3 s.
    """
    importlib.import_module("torch._dynamo")  # which the first step would import
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Uses two threads on every machine, so that work is split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The available instruction sets; afterwards the previous one is selected again."""
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    before = onepass.ops.cpu_isa()
    yield list(instruction_sets())
    onepass.ops.cpu_isa(before)


@pytest.fixture
def cuda_stand_in() -> Iterator[None]:
    """Registers the stand-in for the CUDA backend as STAND_IN."""
    with stand_in():
        yield


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A target of the backend suite, selected while the test runs."""
    with request.param.selected():
        yield request.param


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[RandomLink]:
    """Makes paged steps complete in a random order, which differs between optimizers.

    Returns:
        The list of links, which grows as optimizers make them.
    """
    made: list[RandomLink] = []
    seeds = count()

    def link_for(_: torch.device) -> RandomLink:
        made.append(RandomLink(next(seeds)))
        return made[-1]

    monkeypatch.setattr(pager, "link_for", link_for)
    return made
