"""Times the steps of one library in its own process, for :mod:`bench.tuning`.

``python -m bench.tuning_step`` imports everything and then waits for a line on stdin, so that
several processes can import while one measures. Then it prints a JSON object for each format.
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
"""Upper limit of the host time of a step in microseconds. Each sample is queued behind work that
takes longer, so that the host time is not measured."""


def measure(name: str, numel: int, samples: int, provider: Provider, device: Device) -> Any:
    """Times steps and copies, interleaved in shuffled order.

    Args:
        name: key of FORMATS.
        numel: elements of the tensor; a copy moves 8 bytes per element.
        samples: samples of each.
        provider: makes the step.
        device: the device to time on.

    Returns:
        The samples in milliseconds, and the bytes of a step and of a copy.
    """
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
    """Runs the measurement; returns 0 on success, 2 if the device or the library is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning_step", description=__doc__)
    parser.add_argument("--device", choices=list(DEVICES), required=True, help="device to measure")
    parser.add_argument(
        "--formats", required=True, help=f"among {', '.join(FORMATS)}, separated by commas"
    )
    parser.add_argument("--numel", type=int, required=True, help="number of elements")
    parser.add_argument("--samples", type=int, required=True, help="samples per format")
    args = parser.parse_args(argv)
    names = args.formats.split(",")
    if unknown := set(names) - set(FORMATS):
        parser.error(f"--formats must be among {', '.join(FORMATS)}; got {', '.join(unknown)}")
    device = DEVICES[args.device]
    (provider,) = find(all_providers(args.device), f"onepass-{args.device}")
    if not sys.stdin.readline():
        return 0  # the parent process has ended
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
