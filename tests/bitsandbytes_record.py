"""Records runs of the 8-bit optimizers of bitsandbytes, including saved state dicts.

Run ``python -m tests.bitsandbytes_record`` with bitsandbytes installed. It writes the runs to
tests/data/bitsandbytes.pt, so tests do not need bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parent / "data" / "bitsandbytes.pt"

SHAPES = [(30, 10), (7,)]  # a full block and a short one; below min_8bit_size
STEPS = 3  # before the state dict is saved; one more step follows
OPTIONS: dict[str, dict[str, Any]] = {
    "Adam8bit": {"lr": 0.02, "weight_decay": 0.1},
    "AdamW8bit": {"lr": 0.02, "weight_decay": 0.1},
    "Lion8bit": {"lr": 0.01, "weight_decay": 0.1},
    "SGD8bit": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adagrad8bit": {"lr": 0.1, "weight_decay": 0.01},
    "RMSprop8bit": {"lr": 0.01, "weight_decay": 0.01},
    "AdEMAMix8bit": {"lr": 0.01, "weight_decay": 0.1, "t_alpha": 5, "t_beta3": 6},
}


def values(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Pseudorandom numbers from -1 to 1 that are equal on all machines."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + 1000 * number
    return ((index * 7919 % 1009 - 504).float() / 512).reshape(shape)


def set_grads(params: list[torch.Tensor], step: int) -> None:
    """Sets the gradients of step 0, 1, ...: the scale of the rows cycles through 1, 0.1, 0.01,
    0.001."""
    for i, param in enumerate(params):
        grad = values(tuple(param.shape), 10 + 2 * step + i)
        if grad.dim() == 2:
            grad = grad * 10.0 ** -(torch.arange(len(grad)) % 4)[:, None]
        param.grad = grad


def record(name: str) -> dict[str, Any]:
    """A run: state dict and weights after STEPS steps, and the weights one step later."""
    import bitsandbytes

    params = [torch.nn.Parameter(values(shape, i)) for i, shape in enumerate(SHAPES)]
    cls = getattr(bitsandbytes.optim, name)
    optimizer = cls(params, **OPTIONS[name], min_8bit_size=256)
    for step in range(STEPS):
        set_grads(params, step)
        optimizer.step()
    state_dict, weights = _copy(optimizer.state_dict()), [p.detach().clone() for p in params]
    set_grads(params, STEPS)
    optimizer.step()
    return {"state_dict": state_dict, "weights": weights, "after": [p.detach() for p in params]}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    # All states share the maps, so the maps are not cloned and the file contains each map once.
    return value.clone() if isinstance(value, torch.Tensor) and value.shape != (256,) else value


def main() -> None:
    import bitsandbytes

    runs = {name: record(name) for name in OPTIONS}
    # Every optimizer created its own maps; keep one of each.
    maps: dict[str, torch.Tensor] = {}
    for run in runs.values():
        for state in run["state_dict"]["state"].values():
            for held in state.values():
                for key in held if isinstance(held, dict) else ():
                    if key.startswith("qmap"):
                        held[key] = maps.setdefault(key, held[key])
    PATH.parent.mkdir(exist_ok=True)
    torch.save({"version": bitsandbytes.__version__, "torch": str(torch.__version__), **runs}, PATH)


if __name__ == "__main__":
    main()
