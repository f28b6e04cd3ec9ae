"""The optimizer phase of a training step (unscale, clip, step, zero) of onepass and torch.

Each call of torch reads or writes the gradients: unscale_ (read, write), the norm (read), clipping
(read, write), step (read), zero_grad (write). onepass runs the norm pass (read) and the sweep
(read, write of zeros). Both set the gradients to zero in place, as gradient accumulation requires.

A sample is the time of all calls of one side; samples of the two sides are interleaved. On a GPU
the time includes waiting for the GPU, because torch's loss scaler waits for it as well. The
gradients are filled before each sample, untimed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import onepass
from onepass_tools.benchmark.timing import percentile

from . import results

SCALE, MAX_NORM = 1024.0, 1.0
LR = 1e-3
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
# Bytes per element: the weight and two moments are read and written (6 accesses); the others are
# reads and writes of the gradient.
BYTES = {"onepass": 4 * (6 + 3), "torch": 4 * (6 + 7)}
NEEDED = {"cpu": 1.3, "cuda": 1.5}  # target: time of torch divided by that of onepass


@dataclass
class Side:
    """One of the two sides.

    Attributes:
        provider: name of the provider.
        param: the weights, updated in place.
        phase: runs the timed calls.
        samples: measured times in milliseconds.
    """

    provider: str
    param: torch.nn.Parameter
    phase: Callable[[], None]
    samples: list[float]


def _backend(param: torch.nn.Parameter) -> Any:
    """The name of the backend that updates the parameter.

    Raises:
        RuntimeError: it is the reference, which is too slow to be measured.
    """
    found = onepass.backends.choose(param.device).name
    if found == "reference":
        raise RuntimeError(
            f"no compiled backend supports {param.device}: `onepass info` prints the reason"
        )
    return found


def _ours(param: torch.nn.Parameter) -> Callable[[], None]:
    optimizer = onepass.AdamW(
        [param], LR, **OPTIONS, max_grad_norm=MAX_NORM, zero_grads=True, backend=_backend(param)
    )
    scaler = onepass.GradScaler(param.device.type, init_scale=SCALE)
    scaler.scale(torch.ones((), device=param.device))

    def phase() -> None:
        scaler.step(optimizer)
        scaler.update()

    return phase


def _torchs(param: torch.nn.Parameter) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([param], LR, **OPTIONS, fused=True)
    scaler = torch.amp.GradScaler(param.device.type, init_scale=SCALE)
    scaler.scale(torch.ones((), device=param.device))

    def phase() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([param], MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)

    return phase


def measure(numel: int, samples: int, device: str = "cpu") -> list[Side]:
    """Compares the results of both sides, and times them.

    Raises:
        RuntimeError: the sides compute different weights, or leave a gradient that is not zero.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(numel, generator=generator).mul_(0.02).to(device)
    grad = torch.randn(numel, generator=generator).mul_(SCALE * 0.01).to(device)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    sides = []
    for make in (_ours, _torchs):
        param = torch.nn.Parameter(weight.clone())
        param.grad = torch.zeros_like(param)
        provider = f"onepass-{_backend(param)}" if make is _ours else "torch-fused"
        sides.append(Side(provider, param, make(param), []))
    del weight
    shuffle = random.Random(0)
    for turn in range(-3, samples):
        for side in shuffle.sample(sides, len(sides)):
            assert side.param.grad is not None
            side.param.grad.copy_(grad)
            wait()
            start = time.perf_counter_ns()
            side.phase()
            wait()
            taken = (time.perf_counter_ns() - start) / 1e6
            if side.param.grad.any():
                raise RuntimeError(f"{side.provider} left a gradient that is not zero")
            if turn >= 0:
                side.samples.append(taken)
        if turn == -2:
            # torch sums 50 M squares in fp32, so its norm has a larger error than one rounding, and
            # so has an update whose gradient is near eps. After two steps the weights must agree to
            # a hundredth of the learning rate.
            ours, theirs = (side.param.detach() for side in sides)
            furthest = float((ours - theirs).abs().max())
            if not furthest <= 0.01 * LR:
                raise RuntimeError(
                    f"the weights of onepass and torch differ by up to {furthest:g}; "
                    f"at most {0.01 * LR:g} is allowed"
                )
    return sides


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success; 1 if a result is wrong; 2 on wrong usage or if the device is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.phase",
        description="Times unscale + clip + step + zero of AdamW in fp32.",
    )
    parser.add_argument(
        "--numel", type=int, default=50_000_000, help="number of elements (default 50 million)"
    )
    parser.add_argument(
        "--device", choices=list(NEEDED), default="cpu", help="device to measure (default cpu)"
    )
    parser.add_argument(
        "--samples", type=int, default=15, help="timed phases per provider (default 15)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append result lines to FILE (default bench/results/phase.jsonl)",
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    for name in ("numel", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.phase: --device cuda needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    env = results.environment(args.device)
    try:
        sides = measure(args.numel, args.samples, args.device)
    except RuntimeError as error:
        print(f"bench.phase: {error}")
        return 1
    lines = []
    for side in sides:
        p = {f"p{n}": round(percentile(side.samples, n), 5) for n in (20, 50, 80)}
        moved = BYTES[side.provider.split("-")[0]] * args.numel
        lines.append(
            {
                **env,
                "kind": "phase",
                "provider": side.provider,
                "numel": args.numel,
                "bytes": moved,
                "ms": p,
                "gbps": round(moved / p["p50"] / 1e6, 4),
                "samples": [round(sample, 5) for sample in side.samples],
            }
        )
    print("unscale + clip + step + zero, AdamW, fp32\n")
    print("\n".join(table(lines)))
    if not args.no_write:
        results.append(args.out or results.ROOT / "bench" / "results" / "phase.jsonl", lines)
    return 0


def table(lines: Sequence[results.Line]) -> list[str]:
    """The newest run of each device among result lines, as Markdown."""
    text = []
    for device in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == device]
        run = [line for line in own if line["date"] == max(line["date"] for line in own)]
        ours, theirs = (
            next(x["ms"]["p50"] for x in run if x["provider"].startswith(name)) for name in BYTES
        )
        needed = NEEDED["cuda" if run[0]["cuda"] else "cpu"]
        dirty = " with uncommitted changes" if run[0]["dirty"] else ""
        text += [
            f"{device}; {run[0]['date']}, commit {str(run[0]['commit'])[:12]}{dirty}, torch "
            f"{run[0]['torch']}; {run[0]['numel']:,} elements. The time of torch is "
            f"{theirs / ours:.2f} times that of onepass (target {needed:g}).",
            "",
            "| provider | p20 ms | p50 ms | p80 ms | GB/s | MB per phase |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for line in run:
            ms = " | ".join(f"{line['ms'][key]:.3f}" for key in ("p20", "p50", "p80"))
            text.append(
                f"| {line['provider']} | {ms} | {line['gbps']:.2f} | {line['bytes'] / 1e6:,.0f} |"
            )
        text.append("")
    return text[:-1]


if __name__ == "__main__":
    sys.exit(main())
