"""Tests that run the same code on the CPU and, if there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import onepass

from ..cases import make_params, set_grads
from .comparison import assert_same

CHUNK = 16384  # elements that one thread block of the cuda backend updates

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
)
ON_CPU = (pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-"),)

each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=ON_GPU)]
)
"""Runs a test on each device; onepass chooses the backend."""

TARGETS = [
    pytest.param("cpu", "cpu", id="cpu", marks=ON_CPU),
    pytest.param("cuda", "cuda", id="cuda", marks=ON_GPU),
    pytest.param("cuda", "triton", id="triton", marks=ON_GPU),
]
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)
"""Runs a test on each device with each named backend."""


def place(params: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Copies of parameters as new parameters on a device."""
    return [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]


def on_gpu(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of parameters as new parameters on the GPU."""
    return place(params, "cuda")


def copy_grads(params: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies the gradients of other parameters to the parameters, on their own device."""
    for param, source in zip(params, sources, strict=True):
        if source.grad is None:
            param.grad = None
            continue
        if source.grad.dtype != param.dtype:
            param.grad_dtype = None
        param.grad = source.grad.to(param.device, copy=True)


class Pair:
    """An optimizer on a device, and a reference optimizer on the CPU.

    Args:
        device, backend: of the optimizer `ours`; onepass chooses if backend is None.
        dtype: dtype of the weights.
        shapes: shapes of the weights if no params are given.
        params: parameters on the device for `ours`.
        cls: class of both optimizers.
        ours: options of `ours` only.
        options: options of both optimizers.
    """

    def __init__(
        self,
        device: str,
        backend: str | None,
        *,
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[tuple[int, ...]] = ((33,), (), (4, 5), (0,), (CHUNK + 2085,)),
        params: Sequence[torch.Tensor] | None = None,
        cls: Callable[..., Any] = onepass.AdamW,
        ours: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options = {"lr": 0.02, "weight_decay": 0.1, **options}
        if params is None:
            self.twins = make_params(list(shapes), dtype, seed=1)
            self.params = place(self.twins, device)
        else:
            self.params = list(params)
            self.twins = place(self.params, "cpu")
        self.ours = cls(self.params, backend=backend, **{**options, **(ours or {})})
        self.reference = cls(self.twins, backend="reference", **options)

    def set_grads(self, seed: int, dtype: torch.dtype | None = None) -> None:
        """Sets the same gradients for both optimizers."""
        set_grads(self.twins, dtype or self.twins[0].dtype, seed)
        copy_grads(self.params, self.twins)

    def step(self, seed: int, dtype: torch.dtype | None = None) -> None:
        """Sets the same gradients and takes a step with both optimizers."""
        self.set_grads(seed, dtype)
        self.ours.step()
        self.reference.step()

    def step_reference(self, grads: Sequence[torch.Tensor | None] | None = None) -> None:
        """Steps the reference with copies of gradients, by default of those of `params`."""
        found = [p.grad for p in self.params] if grads is None else grads
        for twin, grad in zip(self.twins, found, strict=True):
            twin.grad = None if grad is None else grad.detach().to("cpu", copy=True)
        self.reference.step()

    def assert_same(self) -> None:
        """Asserts that the weights and states of both optimizers are equal bit by bit."""
        assert_same(self.ours, self.reference)


def stream_of(device: str) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """A new side stream, None on the CPU, and a function that makes it the current one."""
    if device == "cpu":
        return None, nullcontext
    stream = torch.cuda.Stream()
    return stream, lambda: torch.cuda.stream(stream)


def replayable(device: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that repeats `run`: the replay of a CUDA graph, or `run` itself on the CPU."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
