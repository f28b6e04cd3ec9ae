"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest
import torch

# Triton reads it when it is first imported, for the functions of its own that kernels call.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import onepass
from onepass.paging import pager

from .paging_links import RandomLink
from .support.interpreter import speed_up
from .support.targets import Target, instruction_sets, stand_in

speed_up()

# The files that take longest. The two workers of `make test` take files in this order as they
# become free; a long file that started last would run alone.
SLOWEST = (
    "test_triton_compile",
    "test_bits",
    "test_zero",
    "test_random_ranks",
    "test_session",
    "test_sweep_extras",
    "test_step",
    "test_tuning",
    "test_whole_steps",
    "test_compare",
    "test_memory_cli",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, the others in their order."""
    turn = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Two threads whatever the machine has, so that work is split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The available instruction sets; the one in use before is restored."""
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
    """Paged steps complete in a random order, another one for every optimizer; the links made."""
    made: list[RandomLink] = []
    seeds = count()

    def link_for(_: torch.device) -> RandomLink:
        made.append(RandomLink(next(seeds)))
        return made[-1]

    monkeypatch.setattr(pager, "link_for", link_for)
    return made
