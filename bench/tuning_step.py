"""Times the steps of one library in a process of its own, for :mod:`bench.tuning`.

``python -m bench.tuning_step`` imports everything, waits for a line on stdin, so that imports go on
while another process measures, and then prints a JSON object for each format.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from typing import Any

import torch

from onepass_tools.benchmark.cases import DTYPES
from onepass_tools.benchmark.devices import DEVICES, Device, Step
from onepass_tools.benchmark.provider import Provider
from onepass_tools.benchmark.providers import all_providers, find
from onepass_tools.benchmark.timing import WARM_UP

from .tuning_variants import FORMATS, case_of

HOST_US = 300.0
"""Microseconds that a step keeps the host at most: a sample is queued behind work for longer."""


def measure(name: str, numel: int, samples: int, provider: Provider, device: Device) -> Any:
    """Milliseconds of steps and of copies of 8 bytes an element, in turns of a shuffled order."""
    case = case_of(name, numel)
    params = []
    weights = case.list.normal(0.02, DTYPES[case.dtype], 1, device.type)
    grads = case.list.normal(0.01, DTYPES[case.dtype], 2, device.type)
    for weight, grad in zip(weights, grads, strict=True):
        param = torch.nn.Parameter(weight)
        param.grad = grad
        params.append(param)
    source = torch.ones(numel, device=device.type)
    target = torch.zeros(numel, device=device.type)
    timed: dict[str, Step] = {
        "samples": provider.step(list(params), case, device.type),
        "copy_samples": lambda: target.copy_(source),
    }
    for step in timed.values():
        for _ in range(WARM_UP):
            step()
    found: dict[str, list[float]] = {key: [] for key in timed}
    shuffle = random.Random(0)
    gc.collect()
    for _ in range(samples):
        for key in shuffle.sample(list(timed), len(timed)):
            device.prepare(timed[key], HOST_US, False)
            found[key].append(round(device.time(timed[key]), 5))
    return {"format": name, "bytes": case.bytes, "copy_bytes": 8 * numel, **found}


def main(argv: list[str] | None = None) -> int:
    """Measures; 0 done, 2 no such device or library."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning_step", description=__doc__)
    parser.add_argument("--device", choices=list(DEVICES), required=True)
    parser.add_argument("--formats", required=True, help="of FORMATS, separated by commas")
    parser.add_argument("--numel", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    args = parser.parse_args(argv)
    names = args.formats.split(",")
    if unknown := set(names) - set(FORMATS):
        parser.error(f"--formats must be of {', '.join(FORMATS)}; got {', '.join(unknown)}")
    device = DEVICES[args.device]
    (provider,) = find(all_providers(args.device), f"onepass-{args.device}")
    if not sys.stdin.readline():
        return 0  # the process that asked has ended
    if why := device.unavailable() or provider.unavailable(args.device):
        print(f"bench.tuning_step: {why}", file=sys.stderr)
        return 2
    for name in names:
        found = measure(name, args.numel, args.samples, provider, device)
        print(json.dumps(found), flush=True)
        gc.collect()
        device.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
