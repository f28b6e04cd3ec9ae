"""Random runs over 1 to 3 gloo ranks on this machine, compared with the same runs in one process.

The test runs the seeds in SEEDS. A failure prints its seed and its operations. Environment
variables change what runs:

    ONEPASS_RANDOM_SEED=17        runs this seed only
    ONEPASS_RANDOM_SECONDS=600    runs new random seeds for 600 seconds
    ONEPASS_RANDOM_WITHOUT=a,b    leaves out operations, kinds of gradients, layouts, ways to save,
                                  formats or algorithms by name, such as pending,mx4,async; "norms"
                                  leaves out the check of norms. Each seed then gives another case.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import random
import time
import traceback
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

from . import random_ranks
from .support.processes import forked
from .support.thorough import THOROUGH

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)
SEEDS = [int(os.environ[name]) for name in ("ONEPASS_RANDOM_SEED",) if name in os.environ]
SEEDS = SEEDS or range(48 if THOROUGH else 10)
SECONDS = float(os.environ.get("ONEPASS_RANDOM_SECONDS", 0))

# Timeouts in seconds: of a collective, of a segment of a case (which takes under 1 second), and of
# the wait for the reports of other ranks after one has failed.
COLLECTIVE, SEGMENT, OTHERS = 60, 75, 1


class Ranks:
    """The processes of one process group, which run segments of cases one after the other.

    The processes are reused because importing torch takes seconds. They are replaced after a
    failure, because the ranks may then be in different collectives.
    """

    def __init__(self, world, directory):
        self.world, self.directory, self.processes, self.pipes = world, directory, [], []

    def start(self):
        context = forked()
        self.directory.mkdir(exist_ok=True)
        (self.directory / "store").unlink(missing_ok=True)
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            arguments = (rank, self.world, theirs, self.directory)
            self.processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(mine)
            theirs.close()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def play(self, seed, segment, directory):
        """Runs a segment on all ranks; returns None, or the operations and the failure."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((seed, segment, directory))
        waiting, notes, problems = list(self.pipes), [], []
        end = time.monotonic() + SEGMENT
        while waiting and (ready := wait(waiting, max(0, end - time.monotonic()))):
            for pipe in ready:
                what, text = self.receive(pipe)
                if what == "note":
                    notes.append(text)
                    continue
                waiting.remove(pipe)
                if what == "failed":
                    problems.append(text)
                    end = min(end, time.monotonic() + OTHERS)
        if waiting and not problems:
            for rank in map(self.pipes.index, waiting):
                problems.append(f"rank {rank} hangs after {SEGMENT} s\n{self.trace(rank)}")
        if problems:
            self.stop()
        return "\n".join([*notes, *problems]) if problems else None

    def receive(self, pipe):
        """Receives a message from a rank, or reports that the rank has exited."""
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            rank = self.pipes.index(pipe)
            self.processes[rank].join(OTHERS)
            code = self.processes[rank].exitcode
            return "failed", f"rank {rank} ended with exit code {code}\n{self.trace(rank)}"

    def trace(self, rank):
        """The stack trace of a rank when it died or hung."""
        path = self.directory / f"fault{rank}"
        return path.read_text() if path.exists() else ""


def _rank(rank, world, pipe, directory):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    fault = open(directory / f"fault{rank}", "w")  # noqa: SIM115
    faulthandler.enable(fault)
    timeout = datetime.timedelta(seconds=COLLECTIVE)
    store = {"init_method": f"file://{directory}/store", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", timeout=timeout, **store)
    groups = [dist.new_group([i]) for i in range(world)][rank], dist.new_group()

    def note(text):
        if rank == 0:
            pipe.send(("note", text))

    while True:
        seed, segment, path = pipe.recv()
        faulthandler.dump_traceback_later(COLLECTIVE - 5, file=fault)
        try:
            random_ranks.play(seed, segment, path, note, *groups)
            pipe.send(("done", ""))
        except BaseException:  # some checkpoint errors of torch are not Exceptions
            pipe.send(("failed", f"rank {rank}: {traceback.format_exc()}"))
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    found = {world: Ranks(world, directory / str(world)) for world in (1, 2, 3)}
    yield found
    for each in found.values():
        each.stop()


def problem_of(ranks, seed, directory):
    for segment, world in enumerate(random_ranks.worlds_of(seed)):
        why = ranks[world].play(seed, segment, directory)
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
    end, failures, count = time.monotonic() + SECONDS, [], 0
    while time.monotonic() < end:
        seed, count = random.SystemRandom().randrange(1 << 32), count + 1
        directory = tmp_path / str(seed)
        directory.mkdir()
        if (why := problem_of(ranks, seed, directory)) is not None:
            print(why, flush=True)
            failures.append(why)
    assert not failures, f"{len(failures)} of {count} seeds fail\n" + "\n\n".join(failures)
