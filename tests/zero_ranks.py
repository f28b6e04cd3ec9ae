"""Runs checks in several processes on one machine and collects the results.

All checks for one number of ranks run in one set of processes, one after the other: starting
processes and importing torch takes longer than the checks.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from .support.processes import forked

# Timeout in seconds of all checks of one number of ranks: four ranks on two CPU cores took 60.
PATIENCE = 240


def run(world, checks, directory, **arguments):
    """Runs checks, which are functions of a directory, on `world` ranks.

    Collectives time out earlier than the parent process, which then ends all ranks.

    Returns:
        Name -> None if the check passed, else the traceback.
    """
    context = forked()
    ranks = [
        context.Process(target=_rank, args=(rank, world, checks, directory, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.1, end - time.monotonic()))
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    found = {check.__name__: [] for check in checks}
    for rank in range(world):
        path = Path(directory, f"found{rank}")
        told = pickle.loads(path.read_bytes()) if path.exists() else {}
        for name, why in found.items():
            fault = Path(directory, f"fault{rank}")
            where = fault.read_text() if fault.exists() else ""
            problem = told.get(name, f"no result (exit code {ranks[rank].exitcode})\n{where}")
            if problem is not None:
                why.append(f"rank {rank} of {world}: {problem}")
    return {name: "\n".join(why) or None for name, why in found.items()}


def _rank(rank, world, checks, directory, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # This file gets the stack trace of a rank that dies from a signal, and what C++ code prints to
    # standard error before it aborts.
    fault = open(f"{directory}/fault{rank}", "w")  # noqa: SIM115
    os.dup2(fault.fileno(), 2)
    faulthandler.enable(fault)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=20),
    )
    told = {}
    for check in checks:
        try:
            torch.manual_seed(0)
            check(Path(directory), **arguments)
            told[check.__name__] = None
        except BaseException:
            told[check.__name__] = traceback.format_exc()
            break  # other ranks may be in another collective, so later checks are meaningless
        finally:
            Path(directory, f"found{rank}").write_bytes(pickle.dumps(told))
    os._exit(0)  # does not wait for ranks that have exited
