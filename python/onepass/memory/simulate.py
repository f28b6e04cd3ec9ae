"""Simulates the memory use of any optimizer whose step consists of torch operations.

The optimizer steps over parameters without memory, and the storages that its operations would
allocate are counted. Memory that a kernel allocates and frees within one operation is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .predict import block_of, category_of, storage_bytes
from .report import Bytes
from .storage_tracking import Ledger, plain_tensors

Make = Callable[[list[torch.nn.Parameter]], Any]
"""Parameters -> an optimizer over them."""

STEPS = 2  # the first step creates the states


class CannotSimulateError(RuntimeError):
    """Raised if the step of an optimizer cannot be simulated; the message gives the reason."""


def with_gradients(
    like: Iterable[torch.Tensor], device: torch.device | str, grad_dtype: torch.dtype | None
) -> list[torch.nn.Parameter]:
    """Makes parameters of the same shapes and dtypes, and gradients, all filled with 1e-3."""
    params = []
    for tensor in like:
        value = torch.full_like(tensor, 1e-3, device=device, requires_grad=False)
        param = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        if tensor.requires_grad:
            if grad_dtype is not None and grad_dtype != param.dtype:
                param.grad_dtype = None
            param.grad = torch.full_like(value, 1e-3, dtype=grad_dtype)
        params.append(param)
    return params


def state_bytes(
    optimizer: Any, categorise: Callable[[str], str] = category_of, block: int = 1
) -> dict[str, int]:
    """Bytes of the storages in ``optimizer.state`` by category, with each storage counted once.

    The first key under which a storage is found determines its category.
    """
    seen: set[int] = set()
    found: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            for tensor in plain_tensors(value):
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    category = categorise(key)
                    nbytes = -(-storage.nbytes() // block) * block
                    found[category] = found.get(category, 0) + nbytes
    return found


def simulate(
    make: Make,
    like: Sequence[torch.Tensor],
    grad_dtype: torch.dtype | None = None,
    device: str = "cpu",
    categorise: Callable[[str], str] = category_of,
) -> Bytes:
    """Predicts the bytes of parameters, gradients, states and temporary tensors of a step.

    Args:
        make: parameters -> an optimizer over them.
        like: tensors with the shapes and dtypes of the parameters.
        grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
        device: the device type that the optimizer sees when it selects its implementation.
        categorise: key of a state -> its category.

    Raises:
        CannotSimulateError: the step reads values of tensors, or calls code outside torch.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    reasons, block = [], block_of(torch.device(device))
    # With fake tensors of the device, an optimizer selects the implementation for that device.
    # A step that reads a number from a tensor needs the meta device, where step counters are real.
    for pretend in (True, False):
        mode: Any = (
            FakeTensorMode(allow_non_fake_inputs=True) if pretend else contextlib.nullcontext()
        )
        try:
            with mode:
                where = device if pretend else "meta"
                return _run(make, like, grad_dtype, where, categorise, block)
        except Exception as error:  # third-party optimizers can raise anything
            first = (str(error).strip().splitlines() or [""])[0]
            reasons.append(f"{type(error).__name__}: {first}")
    raise CannotSimulateError(reasons[-1])


def _run(
    make: Make,
    like: Sequence[torch.Tensor],
    grad_dtype: torch.dtype | None,
    device: str,
    categorise: Callable[[str], str],
    block: int,
) -> Bytes:
    params = with_gradients(like, device, grad_dtype)
    optimizer = make(params)
    extra = 0
    with torch.compiler.set_stance("force_eager"):
        for _ in range(STEPS):
            with Ledger() as ledger:
                # Existing storages must not be counted as new if an operation returns them.
                for tensor in (*params, *(p.grad for p in params if p.grad is not None)):
                    ledger.enter(tensor)
                for tensor in plain_tensors([dict(s) for s in optimizer.state.values()]):
                    ledger.enter(tensor)
                optimizer.step()
            extra = max(extra, ledger.peak - ledger.live)
    return Bytes(
        weights=storage_bytes(params, block),
        gradients=storage_bytes((p.grad for p in params if p.grad is not None), block),
        temporary=extra,
        **state_bytes(optimizer, categorise, block),
    )
