"""Time of a step of Muon: onepass and torch.optim.Muon over the same matrices, interleaved.

The sweeps' share is the time of the step without its products. The weights of the providers are
compared after the measurement, because both must have done the same work. The Muon of dion is
measured on a GPU if the package is installed (pip install git+https://github.com/microsoft/dion);
its coefficients differ, so its weights are not compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import onepass
from onepass.integrations.other_libraries import Library, OptimizerClass
from onepass.muon.batches import Settings
from onepass.muon.products import TorchProducts, TritonProducts

from . import results

GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12
LLAMA = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
LLAMA = [*LLAMA, (14336, 4096), (14336, 4096), (4096, 14336)] * 2
LISTS = {
    "300x64": [(64, 64)] * 300,
    "126x64": [(64, 64)] * 126,
    "gpt2": GPT2,
    "gpt2-layer": GPT2[:4],
    "gpt2-attention-out": GPT2[1:2] * 2,
    "llama3-8b/16": LLAMA,
    "tiny": [(16, 16)] * 8,
}
"""Name -> shapes of the matrices; llama3-8b/16 has 2 of the 32 layers."""

DION = OptimizerClass(Library("dion", "dion", "dion"), "Muon", "muon", {"adjust_lr": "rms_norm"})
"""The Muon of dion; ``use_triton`` computes symmetric products once."""


class NoProducts(TorchProducts):
    """Products that do nothing, to time the sweeps alone."""

    def normalize(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def symmetric_product(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def symmetric_product_plus(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def product_plus(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def make(shapes: list[tuple[int, int]], device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
        param.grad = torch.randn(shape, generator=generator).to(device)
        params.append(param)
    return params


def providers(shapes: list[tuple[int, int]], device: str) -> dict[str, torch.optim.Optimizer]:
    """Name -> optimizer over its own parameters."""
    made: dict[str, torch.optim.Optimizer] = {
        "torch": torch.optim.Muon(make(shapes, device)),
        "onepass": onepass.Muon(make(shapes, device)),
    }
    for precision in ("fp32", "bf16"):
        made[f"onepass-{precision}"] = onepass.Muon(make(shapes, device), precision=precision)
    sweeps = onepass.Muon(make(shapes, device))
    sweeps.products = Settings(None, sweeps.products.scratch, NoProducts())
    made["onepass-sweeps"] = sweeps
    if device == "cuda":
        triton = onepass.Muon(make(shapes, device))
        triton.products = Settings(None, triton.products.scratch, TritonProducts())
        made["onepass-triton-products"] = triton
        missing = DION.library.unavailable()
        if missing:
            print(f"dion: {missing}")
        else:
            made["dion"] = DION.make(make(shapes, device), nesterov=True, use_triton=True)
    return made


def measure(
    made: dict[str, torch.optim.Optimizer], samples: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """The times of each provider's steps in milliseconds, in random order."""
    times: dict[str, list[float]] = {name: [] for name in made}
    order = random.Random(0)
    for sample in range(samples + 1):
        names = list(made)
        order.shuffle(names)
        for name in names:
            wait()
            start = time.perf_counter()
            made[name].step()
            wait()
            if sample:  # the first step builds plans and compiles kernels
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def difference(one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> float:
    """The relative difference of the weights of two optimizers."""
    pairs = zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True)
    off = size = 0.0
    for p, q in pairs:
        off += float((p.detach() - q.detach()).double().square().sum())
        size += float(q.detach().double().square().sum())
    return float((off / size) ** 0.5)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; prints and stores the times."""
    parser = argparse.ArgumentParser(prog="python -m bench.muon", description=__doc__)
    parser.add_argument("--list", choices=LISTS, default="300x64")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--only", default="", help="providers, separated by commas")
    parser.add_argument("--out", type=Path, help="append result lines to this file")
    args = parser.parse_args(argv)
    made = providers(LISTS[args.list], args.device)
    if args.only:
        made = {name: made[name] for name in args.only.split(",")}
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    times = measure(made, args.samples, wait)
    found = []
    for name, values in times.items():
        line: dict[str, Any] = {
            **results.environment(args.device),
            "kind": "muon",
            "list": args.list,
            "provider": name,
            "ms": statistics.median(values),
            "least_ms": min(values),
            "samples": len(values),
        }
        if "torch" in times:
            line["times_torch"] = statistics.median(times["torch"]) / statistics.median(values)
            if name not in ("onepass-sweeps", "dion"):
                line["difference"] = difference(made[name], made["torch"])
        found.append(line)
        words = f"{name:24} {line['ms']:10.2f} ms (least {line['least_ms']:.2f})"
        if "times_torch" in line:
            words += f", {line['times_torch']:.2f} times torch"
        if "difference" in line:
            words += f", weights differ by {line['difference']:.1e}"
        print(words)
    if args.out:
        results.append(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
