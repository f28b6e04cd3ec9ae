"""How formats of Muon's momentum change its update, measured on the matrices of a trained model.

A byte-level GPT trains with Muon on the text of this repository. The gradients of the last steps
are kept. Each format then keeps a momentum of its own over these steps, which is decoded, updated
and encoded at every step. Printed are the cosines of the orthogonalised updates with those of fp32:
with the fp32 momentum encoded once, and with the format's own momentum, which collects the rounding
errors of about 20 steps. ``linear8`` are 8-bit integers in blocks that share a scale; onepass does
not have them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import onepass
from onepass.formats import STATE_FORMATS, Moment
from onepass_tools.demo.model import GPT, Shape

from . import results

MOMENTUM, LR, ADAMW_LR = 0.95, 0.02, 3e-3
KEPT = 40  # steps whose gradients are kept; after 40 steps, 0.95^40 = 0.13 of the start is left
Tensor = torch.Tensor


class Code(NamedTuple):
    """A format.

    Attributes:
        bytes: bytes of a value, with its share of the scale.
        run: (fp32 values, random numbers) -> the values after encoding and decoding.
    """

    bytes: float
    run: Callable[[Tensor, torch.Generator], Tensor]


def _bf16(scale: Tensor) -> Tensor:
    """Rounds up to bf16."""
    rounded = scale.bfloat16()
    upper = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.float() < scale, upper, rounded).float()


def _steps(per_binade: int) -> Callable[[Tensor], Tensor]:
    """Rounds up to a power of 2^(1 / per_binade)."""
    return lambda scale: torch.exp2(torch.ceil(torch.log2(scale) * per_binade) / per_binade)


SCALES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "fp32": (4, lambda scale: scale),
    "bf16": (2, _bf16),
    "power of two": (1, _steps(1)),
    "power of 2^(1/8)": (1, _steps(8)),
}
"""Name -> (bytes, the function that rounds a scale up)."""


def linear(block: int, scales: str, rounding: str, bits: int = 8) -> Code:
    """Integers in blocks; rounding is "nearest" or "stochastic"."""
    size, round_up = SCALES[scales]
    largest = (1 << (bits - 1)) - 1

    def run(values: Tensor, generator: torch.Generator) -> Tensor:
        blocks = F.pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
        scale = round_up(blocks.abs().amax(1, keepdim=True) / largest)
        ratio = torch.where(scale > 0, blocks / scale, 0.0)
        if rounding == "stochastic":
            codes = torch.floor(ratio + torch.rand(ratio.shape, generator=generator))
        else:
            codes = ratio.round()
        codes = codes.clamp(-largest, largest)
        return (codes * scale).flatten()[: values.numel()].view_as(values)

    return Code(bits / 8 + size / block, run)


def known(name: str) -> Code:
    """A state format of onepass, for a first moment."""
    form = STATE_FORMATS[name]

    def run(values: Tensor, generator: torch.Generator) -> Tensor:
        flat = values.flatten().numpy()
        bits = torch.randint(0, 1 << 16, flat.shape, generator=generator).numpy().astype(np.uint32)
        moment = Moment("first", 0)
        decoded = form.decode(*form.encode(flat, bits, moment), len(flat), moment)
        return torch.from_numpy(decoded.copy()).view_as(values)

    return Code(form.bytes, run)


CODES: dict[str, Code] = {
    "bf16": known("bf16"),
    **{
        f"linear{bits} {rounding}, blocks of {block}, {scales}": linear(
            block, scales, rounding, bits
        )
        for bits, block, scales, rounding in (
            (8, 32, "bf16", "nearest"),
            (8, 32, "bf16", "stochastic"),
            (8, 32, "power of two", "nearest"),
            (8, 32, "power of two", "stochastic"),
            (8, 16, "power of 2^(1/8)", "nearest"),
            (8, 64, "fp32", "nearest"),
            (8, 128, "fp32", "nearest"),
            (10, 32, "bf16", "nearest"),
            (12, 32, "bf16", "nearest"),
        )
    },
    "mx8": known("mx8"),
    "mx4": known("mx4"),
}


def train(shape: Shape, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Trains; returns the momenta of the last block's matrices before the last steps.

    Returns:
        "start": name -> momentum; "grads": name -> the gradients [KEPT, rows, cols] after it.
    """
    torch.manual_seed(seed)
    paths = [*sorted((results.ROOT / "docs").rglob("*.md"))]
    paths += sorted((results.ROOT / "python").rglob("*.py"))
    text = b"".join(path.read_bytes() for path in paths)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = GPT(shape)
    optimizer = onepass.Muon(onepass.muon_groups(model, LR, ADAMW_LR))
    matrices = {*optimizer.param_groups[0]["params"]}
    names = {
        name: param
        for name, param in model.named_parameters()
        if param in matrices and name.startswith(f"blocks.{shape.depth - 1}.")
    }
    generator = torch.Generator().manual_seed(seed)
    start: dict[str, Tensor] = {}
    grads: dict[str, list[Tensor]] = {name: [] for name in names}
    for step in range(steps):
        starts = torch.randint(0, len(data) - shape.context - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + shape.context + 1] for i in starts.tolist()])
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        for name, param in names.items():
            if step == steps - KEPT:
                start[name] = optimizer.state[param]["momentum_buffer"].clone()
            if step >= steps - KEPT:
                assert param.grad is not None
                grads[name].append(param.grad.clone())
        optimizer.step()
    return {"start": start, "grads": {name: torch.stack(found) for name, found in grads.items()}}


def update_of(momentum: Tensor, grad: Tensor) -> Tensor:
    """The orthogonalised Nesterov direction, with fp32 products."""
    x = MOMENTUM * momentum + (1 - MOMENTUM) * grad
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two matrices."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def measure(start: Tensor, grads: Tensor, codes: dict[str, Code]) -> dict[str, list[float]]:
    """Format -> the cosines of a matrix: with one encoding, and with a momentum of its own."""
    generator = torch.Generator().manual_seed(0)
    exact = start.clone()
    for grad in grads:
        exact.lerp_(grad, 1 - MOMENTUM)
    expected, found = update_of(exact, grads[-1]), {}
    for name, code in codes.items():
        once = cosine(update_of(code.run(exact, generator), grads[-1]), expected)
        own = start
        for grad in grads:
            # A step computes the direction before it encodes the momentum.
            own = code.run(own, generator).lerp(grad, 1 - MOMENTUM)
        found[name] = [once, cosine(update_of(own, grads[-1]), expected)]
    return found


def table(lines: list[results.Line]) -> str:
    """The cosines of the newest line, in Markdown."""
    line = lines[-1]
    rows = [
        "| stored momentum | bytes | one encoding, mean / worst | kept for "
        f"{KEPT} steps, mean / worst |",
        "|---|---:|---:|---:|",
    ]
    for name, pairs in line["cosines"].items():
        words = (f"{sum(v) / len(v):.4f} / {min(v):.4f}" for v in zip(*pairs, strict=True))
        rows.append(f"| {name} | {CODES[name].bytes:.4g} | {' | '.join(words)} |")
    text = (
        f"Measured by `python -m bench.momentum_formats` on a CPU ({line['date'][:10]}, commit "
        f"{str(line['commit'])[:7]}): the {len(pairs)} matrices of a block of width "
        f"{line['width']}, trained for {line['steps']} steps of {line['batch'] * line['context']} "
        "bytes. The cosines are those of the orthogonalised update and the update of fp32."
    )
    return "\n".join([*rows, "", text])


def main(argv: list[str] | None = None) -> int:
    """Prints the mean and the worst cosine of each format."""
    parser = argparse.ArgumentParser(prog="python -m bench.momentum_formats", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=160, help=f"at least {KEPT}")
    parser.add_argument("--codes", default="", help="only the formats whose names contain this")
    parser.add_argument(
        "--matrices", type=Path, help="file of the trained matrices; written if it does not exist"
    )
    parser.add_argument("--out", type=Path, help="append a result line to this file")
    args = parser.parse_args(argv)
    if args.matrices and args.matrices.exists():
        trained = torch.load(args.matrices)
    else:
        shape = Shape(args.context, args.width, args.depth, 8)
        trained = train(shape, args.steps, args.batch, seed=0)
        if args.matrices:
            torch.save(trained, args.matrices)
    codes = {name: code for name, code in CODES.items() if args.codes in name}
    cosines: dict[str, list[list[float]]] = {name: [] for name in codes}
    for name, start in trained["start"].items():
        for code, pair in measure(start, trained["grads"][name], codes).items():
            cosines[code].append(pair)
    for name, pairs in cosines.items():
        once, own = (list(values) for values in zip(*pairs, strict=True))
        words = (f"{sum(v) / len(v):.4f} / {min(v):.4f}" for v in (once, own))
        print(
            f"{name:50} {codes[name].bytes:.4f} bytes, mean / worst: one encoding {next(words)}; "
            f"own momentum {next(words)}"
        )
    if args.out:
        options = {
            key: value for key, value in vars(args).items() if key not in ("out", "matrices")
        }
        line = {**results.environment(), "kind": "momentum", **options, "cosines": cosines}
        results.append(args.out, [json.loads(json.dumps(line))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
