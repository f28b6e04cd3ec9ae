"""Comparison of tensors and optimizers bit by bit."""

from __future__ import annotations

from typing import Any

import torch

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit; any two NaNs are equal. Devices may differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    word = WORDS[a.dtype.itemsize]
    equal = a.contiguous().view(word) == b.contiguous().view(word)
    return bool((equal | (a.isnan() & b.isnan())).all())


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of all groups, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def states_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a parameter's state, except its step counter."""
    state = optimizer.state[param]
    return [v for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"]


def assert_same(a: Any, b: Any) -> None:
    """Asserts that two optimizers, or two lists of tensors, are equal bit by bit.

    Optimizers are compared by parameters and states.
    """
    if isinstance(a, list):
        assert len(a) == len(b)
        differ = [i for i, pair in enumerate(zip(a, b, strict=True)) if not same_bits(*pair)]
        assert not differ, f"tensors {differ} differ"
        return
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        assert same_bits(p, q), f"parameter {i}"
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            other = b.state[q][key]
            same = same_bits(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, f"{key} of parameter {i}"
