"""How formats of Muon's momentum change its update, measured on the matrices of a trained model.

A byte-level GPT trains with Muon on the text of this repository. Beside its fp32 momentum, every
format keeps a momentum of its own, which is decoded, updated and encoded at every step. Printed are
the cosines of the orthogonalised updates with that of fp32: after one encoding of the fp32
momentum, and with the format's own momentum. ``linear8`` are 8-bit integers in blocks of 32 with a
scale that is a power of two (one byte) or a bf16 number (two bytes).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import onepass
from onepass.formats import STATE_FORMATS, Moment
from onepass_tools.demo.model import GPT, Shape

from . import results

BLOCK, LARGEST = 32, 127
ROOT = Path(__file__).parents[1]
Code = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""(fp32 values, random numbers) -> the values after encoding and decoding."""


def linear(scales: str, stochastic: bool) -> Code:
    """8-bit integers in blocks; scales is "power" or "bf16"."""

    def code(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        blocks = F.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / LARGEST
        if scales == "power":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        else:
            rounded = scale.bfloat16()
            low = rounded.float() < scale
            scale = torch.where(low, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)
            scale = scale.float()
        ratio = torch.where(scale > 0, blocks / scale, 0.0)
        if stochastic:
            codes = torch.floor(ratio + torch.rand(ratio.shape, generator=generator))
        else:
            codes = ratio.round()
        codes = codes.clamp(-LARGEST, LARGEST)
        return (codes * scale).flatten()[: values.numel()].view_as(values)

    return code


def known(name: str) -> Code:
    """A state format of onepass, for a first moment."""
    form = STATE_FORMATS[name]

    def code(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        flat = values.flatten().numpy()
        bits = torch.randint(0, 1 << 16, flat.shape, generator=generator).numpy().astype(np.uint32)
        moment = Moment("first", 0)
        decoded = form.decode(*form.encode(flat, bits, moment), len(flat), moment)
        return torch.from_numpy(decoded.copy()).view_as(values)

    return code


CODES: dict[str, Code] = {
    "bf16": known("bf16"),
    "linear8 nearest, bf16 scale": linear("bf16", False),
    "linear8 stochastic, bf16 scale": linear("bf16", True),
    "linear8 nearest, power-of-two scale": linear("power", False),
    "linear8 stochastic, power-of-two scale": linear("power", True),
    "mx8": known("mx8"),
    "mx4": known("mx4"),
}


def update_of(momentum: torch.Tensor, grad: torch.Tensor, mu: float = 0.95) -> torch.Tensor:
    """The orthogonalised Nesterov direction, with fp32 products."""
    x = mu * momentum + (1 - mu) * grad
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of the angle between two matrices."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def measure(shape: Shape, steps: int, batch: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Format -> kind of measurement -> the cosine of each matrix."""
    torch.manual_seed(seed)
    text = b"".join(p.read_bytes() for p in sorted((ROOT / "docs").glob("*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = GPT(shape)
    optimizer = onepass.Muon(onepass.muon_groups(model, 0.02, 3e-3))
    matrices = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(seed)
    own = {name: [torch.zeros_like(p.detach()) for p in matrices] for name in CODES}
    for _ in range(steps):
        starts = torch.randint(0, len(data) - shape.context - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + shape.context + 1] for i in starts.tolist()])
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        for name, buffers in own.items():
            for p, buffer in zip(matrices, buffers, strict=True):
                buffer.copy_(CODES[name](buffer.lerp(p.grad, 0.05), generator))
        optimizer.step()
    found: dict[str, dict[str, list[float]]] = {
        name: {"one encoding": [], "own momentum": []} for name in CODES
    }
    for i, p in enumerate(matrices):
        exact = optimizer.state[p]["momentum_buffer"]
        expected = update_of(exact, p.grad)
        for name, code in CODES.items():
            once = update_of(code(exact, generator), p.grad)
            found[name]["one encoding"].append(cosine(once, expected))
            found[name]["own momentum"].append(cosine(update_of(own[name][i], p.grad), expected))
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints the mean and the worst cosine of each format."""
    parser = argparse.ArgumentParser(prog="python -m bench.momentum_formats", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="append a result line to this file")
    args = parser.parse_args(argv)
    found = measure(Shape(64, args.width, args.depth, 8), args.steps, args.batch, seed=0)
    for name, kinds in found.items():
        words = (f"{k} {sum(v) / len(v):.4f} / {min(v):.4f}" for k, v in kinds.items())
        print(f"{name:40} mean / worst: {'; '.join(words)}")
    if args.out:
        line = {**results.environment(), "kind": "momentum", **vars(args), "cosines": found}
        line["out"] = str(args.out)
        results.append(args.out, [json.loads(json.dumps(line))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
