"""``python -m bench.sgd8bit``: the precision of SGD's 8-bit momentum beside torch's fp32 momentum.

The tolerance is that of bitsandbytes' own test of its 8-bit momentum. Each step starts from equal
weights and momenta, so the errors are those of one step. A line per format goes to
bench/results/sgd8bit.jsonl; ``python -m bench.readme`` writes the table of docs/migrate.md.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import onepass

from . import results
from .results import Line

KIND = "sgd8bit"
PATH = results.ROOT / "bench" / "results" / "sgd8bit.jsonl"
ROWS, COLUMNS, STEPS = 1024, 32, 50
ATOL, RTOL = 3e-3, 1e-3
OPTIONS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}


def measure(states: Any) -> Line:
    """Elements of the momentum beyond the tolerance, and the largest error."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.1
    ours, exact = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    optimizer = onepass.SGD([ours], states=states, **OPTIONS)
    twin = torch.optim.SGD([exact], **OPTIONS)
    beyond, error = [], 0.0
    for _ in range(STEPS):
        gradient = torch.randn(ROWS, COLUMNS, generator=generator) * 0.01
        ours.grad, exact.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        twin.step()
        saved = onepass.convert_state_dict(optimizer, optimizer.state_dict(), states="fp32")
        found = saved["state"][0]["momentum_buffer"]
        wanted = twin.state[exact]["momentum_buffer"]
        close = torch.isclose(wanted, found, rtol=RTOL, atol=ATOL)
        beyond.append(int((~close).sum()))
        error = max(error, float((wanted - found).abs().max()))
        wanted.copy_(found)
        exact.data.copy_(ours.data)
    return {
        "states": states,
        "numel": weight.numel(),
        "steps": STEPS,
        "atol": ATOL,
        "rtol": RTOL,
        "beyond": beyond,
        "error": error,
    }


def table(lines: list[Line]) -> str:
    """The newest line of each format."""
    newest = {line["states"]: line for line in lines}
    rows = [
        "| SGD with | elements beyond the tolerance, at most in one step | of | largest error |",
        "|---|---:|---:|---:|",
    ]
    for states, line in newest.items():
        cells = [f'`states="{states}"`', str(max(line["beyond"])), f"{line['numel']:,}"]
        cells.append(f"{line['error']:.1e}")
        rows.append(f"| {' | '.join(cells)} |")
    last = lines[-1]
    text = (
        f"Measured by `python -m bench.sgd8bit` on a CPU ({last['date'][:10]}, commit "
        f"{str(last['commit'])[:7]}): the momentum in {last['steps']} steps of SGD with momentum "
        "0.9 and gradients of size 0.01, each step beside torch's fp32 step from the same values. "
        f"The tolerance, {last['atol']:g} + {last['rtol']:g} of the value, is that of "
        "bitsandbytes' own test."
    )
    return "\n".join([*rows, "", text])


def main() -> int:
    """Measures each format and appends the lines."""
    env = results.environment()
    kept = ("date", "commit", "dirty", "device", "torch")
    found = [
        {**{name: env[name] for name in kept}, "kind": KIND, **measure(states)}
        for states in ("mx8", "dynamic8", "bf16")
    ]
    results.append(PATH, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
