"""Steps in every format, for compute-sanitizer: python tests/cuda_sanitize.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

STORED = [
    (dtype, weights, states)
    for (weights, form), states in itertools.product(WEIGHT_FORMATS.items(), STATE_FORMATS)
    for dtype in form.codes
]


EXTRAS = {"ema_decay": 0.9, "telemetry": True, "track_changes": True}
"""Optional work of the sweep, in every second list."""


def steps(device: str, backend: str) -> int:
    """Steps one list per format and a list with all formats, and computes the norm of each list.

    Args:
        device: device of the parameters.
        backend: name of the backend.

    Returns:
        The number of lists.
    """
    lists = [[stored] for stored in STORED] + [STORED]
    for number, formats in enumerate(lists):
        groups = []
        for dtype, weights, states in formats:
            storage = torch.ones(3000, dtype=dtype, device=device)
            params = [torch.nn.Parameter(t) for t in (storage[:2561], storage[2563:2570])]
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            groups.append({"params": params, "weights": weights, "states": states})
        extras = EXTRAS if number % 2 or len(formats) > 1 else {}
        optimizer = onepass.AdamW(groups, amsgrad=len(formats) > 1, backend=backend, **extras)
        for _ in range(2):
            optimizer.step()
        plan = optimizer._plan
        assert plan is not None
        (part,) = plan._parts
        assert part.refresh()
        assert bool(part.norm()[0] > 0)
        plan.forget_gradients()
    return len(lists)


def main() -> None:
    count = steps("cuda", "cuda")
    torch.cuda.synchronize()
    print(f"{count} lists stepped")


if __name__ == "__main__":
    main()
