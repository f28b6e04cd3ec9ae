"""``python -m bench.weight_sync``: what recording and taking the changed weights cost.

Times AdamW's step with and without ``track_changes``, in turn, and then three ways to get the
changed weights of the same model: :func:`onepass.take_delta`, a comparison with a copy of the
weights by torch's operations, and a copy of all weights. A line per setting goes to
bench/results/weight_sync.jsonl; ``python -m bench.readme`` writes the table of docs/weight-sync.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import onepass

from . import results
from .results import Line

KIND = "weight_sync"
PATH = results.ROOT / "bench" / "results" / "weight_sync.jsonl"
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 + split8 + mx8": (torch.bfloat16, {"weights": "split8", "states": "mx8"}),
    "bf16 + stochastic + mx8": (torch.bfloat16, {"weights": "stochastic", "states": "mx8"}),
}
SHARE = 0.01
"""Share of the weights that change between two patches."""


def _model(numel: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Ten matrices of equal size and forty vectors."""
    side = max(int((numel / 10) ** 0.5), 1)
    sizes = [(side, side)] * 10 + [(side,)] * 40
    params = (torch.nn.Parameter(torch.randn(size, dtype=dtype, device=device)) for size in sizes)
    model = torch.nn.Module()
    for i, param in enumerate(params):
        param.grad = torch.randn_like(param)
        model.register_parameter(f"weight{i}", param)
    return model


def _time(run: Callable[[], object], device: str) -> float:
    """Milliseconds of a call, with the work that it leaves on a GPU."""
    if device == "cpu":
        start = perf_counter()
        run()
        return 1e3 * (perf_counter() - start)
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _compare(params: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> list[Any]:
    """Positions and values of the weights that differ from a copy, which is then brought up to
    date."""
    found = []
    for param, copy in zip(params, copies, strict=True):
        at = (param.view(-1) != copy.view(-1)).nonzero().view(-1)
        found.append((at.int(), param.view(-1)[at]))
        copy.copy_(param)
    return found


def _set_changed(model: torch.nn.Module, optimizer: Any, share: float) -> None:
    """Makes a random share of the weights the recorded and only changes since the last patch."""
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        bits = optimizer.changes.bits(param, _view(param))
        words = len(bits)
        drawn = torch.rand(words * 32, generator=generator) < share
        drawn[param.numel() :] = False
        word = (drawn.view(-1, 32).long() << torch.arange(32)).sum(1)
        bits.copy_(word.to(torch.int32))
        codes = param.detach().data.view(-1)
        at = drawn[: param.numel()].nonzero().view(-1).to(param.device)
        codes[at] = -codes[at]


def _view(param: torch.Tensor) -> Any:
    """The plain view of a parameter."""
    from onepass.engine.plan_request import PlainParam

    return PlainParam(param)


@torch.no_grad()
def measure(name: str, numel: int, device: str, samples: int) -> Line:
    """Times one setting."""
    dtype, options = SETTINGS[name]
    steps: dict[str, list[float]] = {"without": [], "with": []}
    found: dict[str, Any] = {}
    models = {key: _model(numel, dtype, device) for key in steps}
    optimizers = {
        key: onepass.AdamW(
            models[key].parameters(),
            lr=3e-6,
            track_changes=key == "with",
            **options,
        )
        for key in steps
    }
    for round in range(samples + 3):
        for key in sorted(steps, reverse=bool(round % 2)):
            taken = _time(optimizers[key].step, device)
            if round >= 3:  # the first builds the plan
                steps[key].append(taken)
    model, optimizer = models["with"], optimizers["with"]
    params = list(model.parameters())
    found["numel"] = sum(p.numel() for p in params)
    found["step_ms"] = {key: median(values) for key, values in steps.items()}
    found["step_samples"] = steps
    found["ratio"] = median(b / a for a, b in zip(steps["without"], steps["with"], strict=True))
    del models["without"], optimizers["without"]
    gc.collect()
    onepass.take_delta(model, optimizer)
    copies = [p.detach().clone() for p in params]
    ways: dict[str, list[float]] = {"take_delta": [], "compare": [], "copy": []}
    for round in range(samples + 1):
        _set_changed(model, optimizer, SHARE)
        calls: dict[str, Callable[[], object]] = {
            "take_delta": lambda: onepass.take_delta(model, optimizer),
            "compare": lambda: _compare(params, copies),
            "copy": lambda: [p.detach().clone() for p in params],
        }
        for key, call in calls.items():
            taken = _time(call, device)
            if round:
                ways[key].append(taken)
    _set_changed(model, optimizer, SHARE)
    delta = onepass.take_delta(model, optimizer)
    found |= {"taken_ms": {key: median(values) for key, values in ways.items()}}
    found |= {"changed": delta.numel, "delta_bytes": delta.nbytes}
    return {**found, "bytes": sum(p.nbytes for p in params), "taken_samples": ways}


def table(lines: list[Line]) -> str:
    """The newest line of each device and setting."""
    newest = {(line["device"], line["setting"]): line for line in lines}
    rows = [
        "| device | AdamW with | step | step with `track_changes` | `take_delta` | comparison with "
        "a copy | patch | all weights |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (device, setting), line in newest.items():
        step, taken = line["step_ms"], line["taken_ms"]
        cells = [device, setting, f"{step['without']:.1f} ms"]
        cells += [f"{step['with']:.1f} ms ({line['ratio']:.3f}x)"]
        cells += [f"{taken['take_delta']:.1f} ms", f"{taken['compare']:.1f} ms"]
        cells += [f"{line['delta_bytes'] / 1e6:.1f} MB", f"{line['bytes'] / 1e6:.0f} MB"]
        rows.append(f"| {' | '.join(cells)} |")
    last = lines[-1]
    text = (
        f"Measured by `python -m bench.weight_sync` ({last['date'][:10]}, commit "
        f"{str(last['commit'])[:7]}, torch {last['torch']}): medians of {last['samples']} samples, "
        f"{last['numel'] / 1e6:.0f} M weights of which {100 * SHARE:g} % change. The ratio in "
        "brackets is the median of the ratios of neighbouring steps, which are taken in turn."
    )
    return "\n".join([*rows, "", text])


def main(arguments: list[str] | None = None) -> int:
    """Measures each setting and appends the lines."""
    parser = argparse.ArgumentParser(prog="bench.weight_sync", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--samples", type=int, default=21)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=PATH)
    given = parser.parse_args(arguments)
    env, found = results.environment(given.device), []
    for name in given.settings:
        shared = {**env, "kind": KIND, "setting": name, "samples": given.samples}
        found.append({**shared, **measure(name, given.numel, given.device, given.samples)})
        results.append(given.out, found[-1:])
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
