"""Shared fixtures; tests/conftest.py loads them where tests run."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from itertools import count

import pytest
import torch

# Triton reads TRITON_INTERPRET when it is first imported, so it is set before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import onepass
from onepass.paging import pager

from ..paging_links import RandomLink
from .interpreter import speed_up
from .targets import Target, instruction_sets, stand_in

speed_up()


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
