"""``python -m bench.steps``: runs steps on the GPU for a profiler, without timing them.

The list is larger than the caches, but still small, because a profiler may save and restore all
memory that a kernel writes.
"""

from __future__ import annotations

import argparse
import sys

import torch

from onepass_tools.benchmark.cases import DTYPES, Case
from onepass_tools.benchmark.devices import DEVICES
from onepass_tools.benchmark.param_lists import one
from onepass_tools.benchmark.providers import all_providers, find

PARAMS = one(50_000_000)
CASES = [
    Case("adamw", "fp32", "fp32", PARAMS),
    Case("adamw", "bf16", "mx8", PARAMS, "split16"),
]


def main(argv: list[str] | None = None) -> int:
    """Runs the steps; returns 0 on success, 2 on wrong usage or without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="steps per case (default 3)")
    parser.add_argument(
        "--provider", default="onepass-cuda", help="provider to run (default onepass-cuda)"
    )
    args = parser.parse_args(argv)
    if why := DEVICES["cuda"].unavailable():
        print(f"bench.steps: {why}", file=sys.stderr)
        return 2
    try:
        (provider,) = find(all_providers("cuda"), args.provider)
    except ValueError as error:
        parser.error(str(error))
    if why := provider.unavailable("cuda"):
        print(f"bench.steps: {provider.name}: {why}", file=sys.stderr)
        return 2
    for case in CASES:
        params = []
        for tensor in case.list.normal(0.02, DTYPES[case.dtype], 1, "cuda"):
            param = torch.nn.Parameter(tensor)
            param.grad = torch.full_like(tensor, 0.01)
            params.append(param)
        step = provider.step(list(params), case, "cuda")
        for _ in range(args.steps):
            step()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
