"""Random sequences of operations: whatever happens between two steps, the next one is right.

A sequence is decided by its seed: the optimizer, and operations that each draw from a generator of
their own, so that a part of a sequence can be replayed. What must be true after each step stands in
tests/support/random_world.py.

    ONEPASS_RANDOM_SECONDS=600  runs new seeds for so many seconds in place of the fixed ones
    ONEPASS_RANDOM_SEED=17      replays one seed and prints each operation before it runs;
                                17:0,3,8 replays only these operations of it
    ONEPASS_RANDOM_WITHOUT=a,b* leaves out operations, gradients, settings or faults by name

The message of a failure lists the operations that are enough to cause it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

import onepass

from .support.random_operations import OPERATIONS, WEIGHTS, WITHOUT
from .support.random_world import World

SECONDS = float(os.environ.get("ONEPASS_RANDOM_SECONDS") or 0)
SEED = os.environ.get("ONEPASS_RANDOM_SEED", "")
SEQUENCES, LENGTH = 40, 30  # about 15 seconds on one core
SHRINKING = 5.0  # seconds spent on leaving operations out of a sequence that fails

# --- running ---------------------------------------------------------------------------------


def play(seed: int, chosen: list[int], say: bool = False) -> tuple[World, Exception | None]:
    """Runs some operations of a sequence; returns what they failed with."""
    world = World(seed, say)
    for number in chosen:
        rng = random.Random(f"{seed}/{number}")
        world.number = number
        try:
            OPERATIONS[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]](world, rng)
        except Exception as error:
            return world, error
    return world, None


def shrink(seed: int, chosen: list[int], error: Exception) -> list[int]:
    """The operations without those that the failure does not need."""
    end = time.monotonic() + SHRINKING
    for number in reversed(chosen[:]):
        without = [n for n in chosen if n != number]
        if time.monotonic() < end and type(play(seed, without)[1]) is type(error):
            chosen = without
    return chosen


def run(seed: int, chosen: list[int], say: bool = False) -> None:
    world, error = play(seed, chosen, say)
    if error is None:
        return
    chosen = shrink(seed, [n for n in chosen if n <= world.number], error)
    world, last = play(seed, chosen)
    text, numbers = "\n  ".join(world.log), ",".join(map(str, chosen))
    # What is left out decides which operations a seed stands for.
    without = f"ONEPASS_RANDOM_WITHOUT={','.join(WITHOUT)} " if any(WITHOUT) else ""
    raise AssertionError(
        f"seed {seed}: {type(last).__name__}: {last}\n  {text}\n"
        f"replay: {without}ONEPASS_RANDOM_SEED={seed}:{numbers} pytest tests/test_random_steps.py"
    ) from last


@pytest.fixture(autouse=True)
def _same_isa() -> Iterator[None]:
    """Restores the instruction set: every sequence draws one."""
    before = "" if onepass.ops.missing else onepass.ops.cpu_isa()
    yield
    if before:
        onepass.ops.cpu_isa(before)


@pytest.mark.skipif(bool(SECONDS or SEED), reason="other seeds are asked for")
@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_random_steps(seed):
    run(seed, list(range(LENGTH)))


@pytest.mark.skipif(not SEED, reason="ONEPASS_RANDOM_SEED is not set")
def test_replayed_steps(capfd):
    seed, _, numbers = SEED.partition(":")
    with capfd.disabled():
        run(int(seed), [int(n) for n in numbers.split(",") if n] or list(range(LENGTH)), say=True)


@pytest.mark.skipif(not SECONDS or bool(SEED), reason="ONEPASS_RANDOM_SECONDS is not set")
def test_new_random_steps(capfd):
    end, seeds = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        seed, seeds = random.SystemRandom().randrange(1 << 32), seeds + 1
        with capfd.disabled():  # so that a crash leaves its seed to be read
            print(f"\rsequence {seeds}: ONEPASS_RANDOM_SEED={seed} ", end="", flush=True)
        run(seed, list(range(LENGTH)))
