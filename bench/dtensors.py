"""Host time of a step over DTensors: onepass, onepass over plain tensors, and torch, interleaved.

The list has 2,000 parameters of 16 elements, sharded over a mesh of one process as fully_shard
shards them, so that nearly all of a step is host time. An untimed step precedes each sample. One
thread.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import onepass
from onepass_tools.benchmark.timing import percentile

from . import results

SIZE = 16
NEEDED = {"torch-fused": 10.0}  # target: its time divided by that of onepass over DTensors


def make(tensors: int, place: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Parameters with gradients; ``place`` makes a DTensor of a tensor, or returns it unchanged."""
    params: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(tensors):
        params.append(torch.nn.Parameter(place(torch.randn(SIZE, generator=generator))))
    for param in params:
        param.grad = place(torch.randn(SIZE, generator=generator))
    return params


def measure(tensors: int, samples: int) -> dict[str, list[float]]:
    """The times of each provider's steps in milliseconds.

    Raises:
        RuntimeError: the weights of the providers differ.
    """
    mesh = init_device_mesh("cpu", (1,))

    def sharded(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    lists: dict[str, list[torch.Tensor]] = {
        "onepass-plain": make(tensors, lambda tensor: tensor),
        "onepass-dtensor": make(tensors, sharded),
        "torch-fused": make(tensors, sharded),
    }
    steps: dict[str, Any] = {
        "onepass-plain": onepass.AdamW(lists["onepass-plain"]).step,
        "onepass-dtensor": onepass.AdamW(lists["onepass-dtensor"]).step,
        "torch-fused": torch.optim.AdamW(lists["torch-fused"], fused=True).step,
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0)
    for turn in range(-3, samples):
        for name in shuffle.sample(list(steps), len(steps)):
            steps[name]()  # warms the caches, as in a loop of steps
            start = time.perf_counter_ns()
            steps[name]()
            if turn >= 0:
                taken[name].append((time.perf_counter_ns() - start) / 1e6)
        if turn == -1:
            plain, ours, theirs = (
                torch.stack([getattr(p, "_local_tensor", p).detach() for p in params])
                for params in lists.values()
            )
            if not torch.equal(plain, ours) or not torch.allclose(ours, theirs, atol=1e-6):
                raise RuntimeError(
                    "onepass over DTensors, onepass over plain tensors and torch computed "
                    "different weights"
                )
    return taken


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 0 on success, 1 if a result is wrong, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.dtensors", description=__doc__)
    parser.add_argument(
        "--tensors", type=int, default=2000, help="number of parameters (default 2000)"
    )
    parser.add_argument(
        "--samples", type=int, default=40, help="timed steps per provider (default 40)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append result lines to FILE (default bench/results/dtensors.jsonl)",
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    for name in ("tensors", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    torch.set_num_threads(1)
    env = results.environment()
    with tempfile.TemporaryDirectory() as directory:
        store = f"file://{directory}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            taken = measure(args.tensors, args.samples)
        except RuntimeError as error:
            print(f"bench.dtensors: {error}")
            return 1
        finally:
            dist.destroy_process_group()
    lines = []
    p50 = percentile(taken["onepass-dtensor"], 50)
    print(f"step over {args.tensors:,} tensors of {SIZE} elements, AdamW, fp32, one thread\n")
    print("| provider | p20 us | p50 us | p80 us | time / onepass-dtensor | target |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, samples in taken.items():
        p = {f"p{n}": round(percentile(samples, n), 5) for n in (20, 50, 80)}
        lines.append(
            {**env, "kind": "dtensors", "provider": name, "tensors": args.tensors, "ms": p}
            | {"numel": args.tensors * SIZE, "samples": [round(sample, 5) for sample in samples]}
        )
        us = " | ".join(f"{value * 1e3:,.0f}" for value in p.values())
        needs = f"{NEEDED[name]:g}" if name in NEEDED else ""
        print(f"| {name} | {us} | {p['p50'] / p50:.2f} | {needs} |")
    if not args.no_write:
        results.append(args.out or results.ROOT / "bench" / "results" / "dtensors.jsonl", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
