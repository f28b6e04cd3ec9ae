"""Records runs of schedulefree.AdamWScheduleFree, including saved state dicts.

Run ``python -m tests.schedulefree_record`` with schedulefree installed. It writes the runs to
tests/data/schedulefree.json, so tests do not need schedulefree.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from .bitsandbytes_record import values

PATH = Path(__file__).parent / "data" / "schedulefree.json"

SHAPES = [(3, 2), (4,)]
STEPS = 4  # before the state dicts are saved; one more step follows
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 3, "betas": (0.95, 0.99)},
    {"lr": 0.02, "r": 1.5, "weight_lr_power": 0.5, "warmup_steps": 10, "eps": 1e-6},
]


def parameters() -> list[torch.nn.Parameter]:
    """The weights before the first step."""
    return [torch.nn.Parameter(values(shape, i)) for i, shape in enumerate(SHAPES)]


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    """Sets the gradients of step 0, 1, ...; the package overwrites them."""
    for i, param in enumerate(params):
        param.grad = values(tuple(param.shape), 10 + 2 * step + i)


def record(options: dict[str, Any]) -> dict[str, Any]:
    """A run: state dicts and weights in both modes after STEPS steps, and one step later."""
    from schedulefree import AdamWScheduleFree

    params = parameters()
    optimizer = AdamWScheduleFree(params, **options, foreach=False)
    optimizer.train()
    for step in range(STEPS):
        set_grads(params, step)
        optimizer.step()
    run: dict[str, Any] = {"options": options, "train": _saved(optimizer, params)}
    optimizer.eval()
    run["eval"] = _saved(optimizer, params)
    optimizer.train()
    set_grads(params, STEPS)
    optimizer.step()
    run["after"] = [p.tolist() for p in params]
    optimizer.eval()
    return {**run, "after_eval": [p.tolist() for p in params]}


def _saved(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, Any]:
    """The weights and the state dict as lists and numbers."""
    saved = optimizer.state_dict()
    state = {
        i: {key: value.tolist() for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    return {"weights": [p.tolist() for p in params], "state_dict": {**saved, "state": state}}


def main() -> None:
    from schedulefree import AdamWScheduleFree

    signature = inspect.signature(AdamWScheduleFree).parameters.values()
    recorded = {
        "version": importlib.metadata.version("schedulefree"),
        "torch": str(torch.__version__),
        "arguments": [[p.name, p.default] for p in signature if p.name != "params"],
        "runs": [record(options) for options in OPTIONS],
    }
    PATH.write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
