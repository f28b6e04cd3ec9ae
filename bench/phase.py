"""The optimizer phase of a training step: unscale, clip, step, zero; ours and torch's, in turns.

torch reads or writes the gradients in each of its calls: unscale_ (read, write), the norm (read),
clipping (read, write), step (read), zero_grad (write). onepass has the norm (read) and the sweep
(read, write of the zeros). Both zero in place, as gradients that are accumulated into need.

A sample is all of these calls, on a GPU until it is done with them, since torch's loss scaler waits
for it too. Gradients are filled before each, untimed.
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
# Weight and two moments read and written; of the gradient, passes over it.
BYTES = {"onepass": 4 * (6 + 3), "torch": 4 * (6 + 7)}
NEEDED = {"cpu": 1.3, "cuda": 1.5}


@dataclass
class Side:
    """One of the two.

    Attributes:
        provider: name.
        param: the weights, updated in place.
        phase: the timed calls.
        samples: milliseconds.
    """

    provider: str
    param: torch.nn.Parameter
    phase: Callable[[], None]
    samples: list[float]


def _backend(param: torch.nn.Parameter) -> Any:
    """What serves the parameter, but for the reference: it is too slow to be measured."""
    found = onepass.backends.choose(param.device).name
    if found == "reference":
        raise RuntimeError(f"no compiled backend serves {param.device}: onepass info says why")
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
    """Both sides, checked against each other and timed.

    Raises:
        RuntimeError: they do not come to the same weights.
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
                raise RuntimeError(f"{side.provider} left a gradient")
            if turn >= 0:
                side.samples.append(taken)
        if turn == -2:
            # torch adds 50 M squares up in fp32, so that its norm, and with it a gradient near eps,
            # is off by more than rounding: after two steps within a hundredth of a step.
            ours, theirs = (side.param.detach() for side in sides)
            furthest = float((ours - theirs).abs().max())
            if not furthest <= 0.01 * LR:
                raise RuntimeError(f"onepass and torch come to weights {furthest:g} apart")
    return sides


def main(argv: list[str] | None = None) -> int:
    """Runs it; 0 done, 1 a wrong result, 2 wrong usage or no such device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.phase", description="Times unscale + clip + step + zero, in fp32."
    )
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements (default 50 M)")
    parser.add_argument("--device", choices=list(NEEDED), default="cpu")
    parser.add_argument("--samples", type=int, default=15, help="timed phases of each")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="appended to (default bench/results/phase.jsonl)"
    )
    parser.add_argument("--no-write", action="store_true", help="write no file")
    args = parser.parse_args(argv)
    for name in ("numel", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.phase: there is no GPU here", file=sys.stderr)
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
            f"{run[0]['torch']}; {run[0]['numel']:,} elements. torch's time over ours: "
            f"{theirs / ours:.2f} (needs {needed:g}).",
            "",
            "| provider | p20 ms | p50 ms | p80 ms | GB/s | MB a phase |",
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
