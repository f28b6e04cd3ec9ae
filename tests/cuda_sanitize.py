"""A step of everything, for compute-sanitizer: python tests/cuda_sanitize.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS


def main() -> None:
    stored = [
        (dtype, weights, states)
        for (weights, form), states in itertools.product(WEIGHT_FORMATS.items(), STATE_FORMATS)
        for dtype in form.codes
    ]
    lists = [[(dtype, weights, states)] for dtype, weights, states in stored] + [stored]
    for formats in lists:
        groups = []
        for dtype, weights, states in formats:
            storage = torch.ones(3000, dtype=dtype, device="cuda")
            params = [torch.nn.Parameter(t) for t in (storage[:2561], storage[2563:2570])]
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            groups.append({"params": params, "weights": weights, "states": states})
        optimizer = onepass.AdamW(groups, amsgrad=len(formats) > 1, backend="cuda")
        for _ in range(2):
            optimizer.step()
        (part,) = optimizer._plan._parts  # type: ignore[union-attr]
        assert part.refresh()
        assert bool(part.backend.norm(part.prepared)[0] > 0)
    torch.cuda.synchronize()
    print(f"{len(lists)} lists stepped")


if __name__ == "__main__":
    main()
