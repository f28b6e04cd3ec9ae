"""Time of a step of Muon over matrices that are sharded over several gloo ranks on one CPU.

The same matrices are stepped with exchanges of one round, which do not overlap with the products,
and of several rounds, interleaved. The time without products is that of the sweeps and of the
exchange in one round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import onepass
from onepass.muon import exchange
from onepass.muon.batches import Settings

from . import results
from .muon import LISTS, NoProducts, make

ROUNDS = (1, 2, 4, 16)


def sharded(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    """DTensors with gradients, sharded over all ranks by rows."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for whole in make(shapes, "cpu"):
        assert whole.grad is not None
        param = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        param.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        found.append(param)
    return found


def timed(optimizer: onepass.Muon) -> float:
    """Milliseconds from the first rank's start to the last rank's end of a step."""
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    dist.barrier()
    return 1e3 * (time.perf_counter() - start)


def measure(shapes: list[tuple[int, int]], samples: int, ns_steps: int) -> dict[str, list[float]]:
    """The times of the steps of each provider."""
    exchange.ROUND_NUMEL = 1
    made, times = {}, {}
    for rounds in (0, *ROUNDS):
        name = f"{rounds} rounds" if rounds else "no products"
        optimizer = onepass.Muon(sharded(shapes), ns_steps=ns_steps)
        if not rounds:
            optimizer.products = Settings(None, optimizer.products.scratch, NoProducts())
        exchange.MOST_ROUNDS = rounds or 1
        optimizer.step()  # makes the plan, and with it the rounds
        made[name], times[name] = optimizer, list[float]()
    for _ in range(samples):
        for name, optimizer in made.items():
            times[name].append(timed(optimizer))
    return times


def rank(number: int, args: argparse.Namespace, directory: str) -> None:
    """Runs the measurement on one rank; rank 0 prints it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=number, world_size=args.ranks
    )
    times = measure(LISTS[args.list], args.samples, args.ns_steps)
    found = []
    for name, values in times.items():
        line = {
            **results.environment("cpu"),
            "kind": "muon_ranks",
            "list": args.list,
            "ranks": args.ranks,
            "ns_steps": args.ns_steps,
            "provider": name,
            "ms": statistics.median(values),
            "least_ms": min(values),
            "samples": len(values),
        }
        found.append(line)
        if number == 0:
            print(f"{name:12} {line['ms']:10.2f} ms (least {line['least_ms']:.2f})")
    if number == 0 and args.out:
        results.append(args.out, found)
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; prints and stores the times."""
    parser = argparse.ArgumentParser(prog="python -m bench.muon_ranks", description=__doc__)
    parser.add_argument("--list", choices=LISTS, default="300x64")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--ns-steps", type=int, default=5, help="iterations of the products")
    parser.add_argument("--out", type=Path, help="append result lines to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=rank, args=(number, args, directory))
            for number in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    sys.exit(main())
