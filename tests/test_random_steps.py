"""Random sequences of operations: the step after any operation is correct.

The seed determines a sequence: the optimizer and the operations. Each operation draws from a random
generator of its own, so a part of a sequence can be replayed. The checks after each step are in
tests/support/random_world.py.

    ONEPASS_RANDOM_SECONDS=600    runs new seeds for 600 seconds instead of the fixed ones
    ONEPASS_RANDOM_SEED=17        replays one seed and prints each operation before it runs;
                                  17:0,3,8 replays only the operations 0, 3 and 8 of the seed
    ONEPASS_RANDOM_WITHOUT=a,b*   leaves out operations, gradients, settings or faults by name

The message of a failure lists a reduced set of operations that still causes the failure.
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
from .support.thorough import THOROUGH

SECONDS = float(os.environ.get("ONEPASS_RANDOM_SECONDS") or 0)
SEED = os.environ.get("ONEPASS_RANDOM_SEED", "")
SEQUENCES, LENGTH = 40 if THOROUGH else 8, 30  # a sequence takes one second
SHRINKING = 5.0  # seconds spent on reducing a failing sequence

# --- running ---------------------------------------------------------------------------------


def play(seed: int, chosen: list[int], say: bool = False) -> tuple[World, Exception | None]:
    """Runs the operations `chosen` of a sequence; returns the error that one of them raised."""
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
    """Removes the operations that are not needed to reproduce the failure."""
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
    # The names that are left out change which operations a seed generates.
    without = f"ONEPASS_RANDOM_WITHOUT={','.join(WITHOUT)} " if any(WITHOUT) else ""
    raise AssertionError(
        f"seed {seed}: {type(last).__name__}: {last}\n  {text}\n"
        f"replay: {without}ONEPASS_RANDOM_SEED={seed}:{numbers} pytest tests/test_random_steps.py"
    ) from last


@pytest.fixture(autouse=True)
def _same_isa() -> Iterator[None]:
    """Restores the CPU instruction set, which every sequence selects at random."""
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
        with capfd.disabled():  # the seed stays visible if the process crashes
            print(f"\rsequence {seeds}: ONEPASS_RANDOM_SEED={seed} ", end="", flush=True)
        run(seed, list(range(LENGTH)))
