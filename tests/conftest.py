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

speed_up()

# The files that take longest, of which the Makefile's two workers take the next as they come free:
# one that started last would run alone.
SLOWEST = (
    "test_triton",
    "test_triton_compile",
    "test_zero",
    "test_random_ranks",
    "test_bits",
    "test_cuda_shim",
    "test_session",
    "test_triton_step",
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


def isas() -> list[str]:
    """The instruction sets that this build and machine have."""
    if onepass.ops.missing:
        return []
    before = onepass.ops.cpu_isa()
    found = []
    for name in ("plain", "avx2", "avx512"):
        try:
            onepass.ops.cpu_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    onepass.ops.cpu_isa(before)
    return found


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The available instruction sets; the one in use before is restored."""
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    before = onepass.ops.cpu_isa()
    yield isas()
    onepass.ops.cpu_isa(before)


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
