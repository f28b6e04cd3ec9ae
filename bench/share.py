"""``python -m bench.share``: the optimizer's share of a training step of the demo's model.

The forward and backward pass and the optimizer's step are timed separately, each until it is done.
Each optimizer has a copy of the same model and trains on the same batch; the optimizers are
interleaved. The smaller the batch, the larger the share.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import onepass
from onepass_tools.benchmark.devices import Device
from onepass_tools.benchmark.timing import percentile
from onepass_tools.demo.model import GPT, VOCABULARY, count_parameters
from onepass_tools.demo.runner import CPU, GPU, QUICK, Size

from . import results
from .options import device_of, keep, parser_of
from .results import Line

KIND = "share"
WARM_UP = 3
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "onepass": lambda params: onepass.AdamW(params, **OPTIONS),
    "torch-fused": lambda params: torch.optim.AdamW(params, **OPTIONS, fused=True),
    "torch-foreach": lambda params: torch.optim.AdamW(params, **OPTIONS, foreach=True),
    "torch-forloop": lambda params: torch.optim.AdamW(params, **OPTIONS, foreach=False),
}


@dataclass
class Side:
    """A model with its optimizer.

    Attributes:
        name: name of the optimizer, a key of OPTIMIZERS.
        model, optimizer: the model and its optimizer.
        backward: times of forward and backward pass in milliseconds.
        step: times of the optimizer's step in milliseconds.
    """

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


def measure(size: Size, device: Device, samples: int) -> list[Side]:
    """Times every optimizer on a copy of one model.

    Raises:
        RuntimeError: the final loss of an optimizer differs by 5 % or more from that of torch's
            for-loop AdamW.
    """
    torch.manual_seed(0)
    weights = GPT(size.shape).state_dict()
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.shape.context + 1)
    batch = torch.randint(VOCABULARY, shape, generator=generator).to(device.type)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    sides = []
    for name, make in OPTIMIZERS.items():
        model = GPT(size.shape)
        model.load_state_dict(weights)
        model.to(device.type)
        sides.append(Side(name, model, make(model.parameters())))

    def backward(side: Side) -> None:
        # The same precision as in the demo: bf16 on a GPU, fp32 on a CPU.
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            loss = side.model(inputs, targets)
        loss.backward()

    shuffle = random.Random(0)
    for turn in range(-WARM_UP, samples):
        for side in shuffle.sample(sides, len(sides)):
            device.synchronize()
            taken = device.time(lambda side=side: backward(side))  # type: ignore[misc]
            stepped = device.time(side.optimizer.step)
            side.optimizer.zero_grad()
            if turn >= 0:
                side.backward.append(taken)
                side.step.append(stepped)
    with torch.no_grad():
        losses = {side.name: float(side.model(inputs, targets)) for side in sides}
    for name, loss in losses.items():
        if not abs(loss - losses["torch-forloop"]) < 0.05 * losses["torch-forloop"]:
            raise RuntimeError(
                f"{name} has a final loss of {loss:g}, which differs by 5 % or more from that of "
                f"torch-forloop; all losses: {losses}"
            )
    return sides


def lines_of(sides: Sequence[Side], size: Size, device: Device) -> list[Line]:
    """One result line per optimizer."""
    env = results.environment(device.type)
    found = []
    # All optimizers have the same forward and backward pass: one median over all of them.
    backward = percentile([x for side in sides for x in side.backward], 50)
    for side in sides:
        step = percentile(side.step, 50)
        found.append(
            {
                **env,
                "kind": KIND,
                "provider": side.name,
                "parameters": count_parameters(side.model),
                "tensors": len(list(side.model.parameters())),
                "batch": size.batch,
                "context": size.shape.context,
                "backward_ms": round(backward, 5),
                "step_ms": round(step, 5),
                "samples": [round(x, 5) for x in side.step],
                "backward_samples": [round(x, 5) for x in side.backward],
                "share": round(step / (step + backward), 5),
            }
        )
    return found


def table(lines: Sequence[Line]) -> list[str]:
    """The newest run of each device, as Markdown."""
    text: list[str] = []
    for device in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == device]
        run = [line for line in own if line["date"] == max(line["date"] for line in own)]
        text += [
            f"{device}; {results.origin(run[0])}; {run[0]['parameters']:,} parameters in "
            f"{run[0]['tensors']} tensors, batches of {run[0]['batch']} x {run[0]['context']}.",
            "",
            "| optimizer | forward and backward, ms | step, ms | optimizer share |",
            "|---|---:|---:|---:|",
        ]
        for line in run:
            times = f"{line['backward_ms']:.3f} | {line['step_ms']:.3f}"
            text.append(f"| {line['provider']} | {times} | {line['share']:.2%} |")
        text += ["", *_faster(run)]
    return text[:-1]


def _faster(run: Sequence[Line]) -> list[str]:
    """A sentence and an empty line for each optimizer whose step is shorter than ours."""
    ours = next(line["step_ms"] for line in run if line["provider"] == "onepass")
    text: list[str] = []
    for line in run:
        if line["step_ms"] < ours:
            less = 1 - line["step_ms"] / ours
            text += [f"{line['provider']} takes {less:.1%} less time per step than onepass.", ""]
    return text


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success; 1 if a result is wrong; 2 on wrong usage or if the device is missing.
    """
    parser = parser_of(KIND, __doc__, 100, "training steps per optimizer (default 100)")
    parser.add_argument(
        "--quick", action="store_true", help="train a tiny model; write no file unless --out is set"
    )
    args = parser.parse_args(argv)
    device = device_of(parser, args)
    if device is None:
        return 2
    size = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    try:
        sides = measure(size, device, args.samples)
    except RuntimeError as error:
        print(f"bench.share: {error}", file=sys.stderr)
        return 1
    lines = lines_of(sides, size, device)
    print("\n".join(table(lines)))
    if not args.quick or args.out is not None:
        keep(args, KIND, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
