"""Random runs over 1 to 3 gloo ranks on this machine, compared with one process.

The suite runs SEEDS. ONEPASS_RANDOM_SECONDS=600 runs fresh seeds for as long instead, and
ONEPASS_RANDOM_SEED=17 one of them. A failure prints its seed and its sequence of operations.
ONEPASS_RANDOM_WITHOUT=pending,mx4 leaves out operations, kinds of gradients, layouts, ways to save,
formats and algorithms by name, which changes the cases that seeds stand for.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import random
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from . import random_ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)
SEEDS = range(100)
SECONDS = float(os.environ.get("ONEPASS_RANDOM_SECONDS", 0))
if "ONEPASS_RANDOM_SEED" in os.environ:
    SEEDS = [int(os.environ["ONEPASS_RANDOM_SEED"])]

# Seconds: of a collective; of a segment, which takes less than one; and how long the other ranks
# may take to report once one has failed.
COLLECTIVE, SEGMENT, OTHERS = 60, 75, 1


class Ranks:
    """A process group that runs segments of cases one after the other.

    Processes are used again, because importing torch costs seconds. They are started anew after a
    failure: the ranks may then be in different collectives.
    """

    def __init__(self, world, directory):
        self.world, self.directory, self.processes = world, directory, []

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.random_ranks", "tests.zero_ranks"])
        self.directory.mkdir(exist_ok=True)
        (self.directory / "store").unlink(missing_ok=True)
        pairs = [context.Pipe() for _ in range(self.world)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_rank, args=(i, self.world, theirs, self.directory), daemon=True)
            for i, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def play(self, seed, segment, directory):
        """Runs a segment on all ranks; returns None or what went wrong."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((seed, segment, directory))
        end, notes, problems = time.monotonic() + SEGMENT, [], []
        waiting = dict(enumerate(self.pipes))
        while waiting and time.monotonic() < end:
            for pipe in wait(list(waiting.values()), max(0, end - time.monotonic())):
                rank = self.pipes.index(pipe)
                try:
                    what, text = pipe.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(OTHERS)
                    code = self.processes[rank].exitcode
                    what, text = "failed", f"ended (exit code {code})\n{self.trace(rank)}"
                if what == "note":
                    notes += [text] * (rank == 0)
                    continue
                del waiting[rank]
                if what == "failed":
                    problems.append(f"rank {rank} of {self.world}: {text}")
                    end = min(end, time.monotonic() + OTHERS)
        if not waiting and not problems:
            return None
        if not problems:
            traces = "".join(f"rank {i}:\n{self.trace(i)}" for i in waiting)
            problems = [f"ranks {sorted(waiting)} do nothing for {SEGMENT} s\n{traces}"]
        self.stop()
        return "\n".join([*notes, *problems])

    def trace(self, rank):
        """Where a rank was when it died or hung."""
        path = self.directory / f"fault{rank}"
        return path.read_text() if path.exists() else ""


def _rank(rank, world, pipe, directory):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    fault = open(directory / f"fault{rank}", "w")  # noqa: SIM115
    faulthandler.enable(fault)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=COLLECTIVE),
    )
    groups = [dist.new_group([i]) for i in range(world)][rank], dist.new_group()

    def note(text):
        pipe.send(("note", text))

    while True:
        seed, segment, path = pipe.recv()
        faulthandler.dump_traceback_later(COLLECTIVE - 5, file=fault)
        try:
            random_ranks.play(seed, segment, Path(path), note, *groups)
            pipe.send(("done", ""))
        except BaseException:  # errors of torch's checkpoints are no Exceptions
            pipe.send(("failed", traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    found = {world: Ranks(world, directory / str(world)) for world in (1, 2, 3)}
    yield found
    for each in found.values():
        each.stop()


def problem_of(ranks, seed, directory):
    """None, or the operations of a seed and what went wrong."""
    for segment, world in enumerate(random_ranks.Case(seed).worlds):
        why = ranks[world].play(seed, segment, str(directory))
        if why is not None:
            return f"ONEPASS_RANDOM_SEED={seed}\n{why}"
    return None


@pytest.mark.skipif(SECONDS > 0, reason="fresh seeds run instead")
@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_do_what_one_process_does(ranks, seed, tmp_path):
    why = problem_of(ranks, seed, tmp_path)
    assert why is None, why


@pytest.mark.skipif(SECONDS == 0, reason="ONEPASS_RANDOM_SECONDS is not set")
def test_fresh_seeds(ranks, tmp_path):
    end, found, count = time.monotonic() + SECONDS, [], 0
    while time.monotonic() < end:
        seed, count = random.SystemRandom().randrange(1 << 32), count + 1
        directory = tmp_path / str(seed)
        directory.mkdir()
        if (why := problem_of(ranks, seed, directory)) is not None:
            print(why, flush=True)
            found.append(why)
    assert not found, f"{len(found)} of {count} seeds fail\n" + "\n\n".join(found)
