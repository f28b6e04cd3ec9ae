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

CHUNK = 16384  # elements that one thread block of the cuda backend takes

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
)
ON_CPU = (pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-"),)

each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=ON_GPU)]
)
"""For tests that let onepass choose the backend of a device."""

TARGETS = [
    pytest.param("cpu", "cpu", id="cpu", marks=ON_CPU),
    pytest.param("cuda", "cuda", id="cuda", marks=ON_GPU),
    pytest.param("cuda", "triton", id="triton", marks=ON_GPU),
]
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)
"""For tests that name the backend."""


def place(params: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Copies of parameters as new parameters on a device."""
    return [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]


def on_gpu(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of parameters as new parameters on the GPU."""
    return place(params, "cuda")


def copy_grads(params: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Gives parameters copies of the gradients of others, on their own device."""
    for param, source in zip(params, sources, strict=True):
        if source.grad is None:
            param.grad = None
            continue
        if source.grad.dtype != param.dtype:
            param.grad_dtype = None
        param.grad = source.grad.to(param.device, copy=True)


class Pair:
    """An optimizer on a device and its twin, the reference backend on the CPU.

    Args:
        device, backend: of ours; backend None lets onepass choose.
        dtype: of the weights.
        shapes: of the weights, where no params are given.
        params: parameters on the device that ours steps.
        cls: class of both optimizers.
        ours: options of ours alone.
        options: of both.
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
        """Gives both the same gradients."""
        set_grads(self.twins, dtype or self.twins[0].dtype, seed)
        copy_grads(self.params, self.twins)

    def step(self, seed: int, dtype: torch.dtype | None = None) -> None:
        """A step of both with the same gradients."""
        self.set_grads(seed, dtype)
        self.ours.step()
        self.reference.step()

    def step_reference(self, grads: Sequence[torch.Tensor | None] | None = None) -> None:
        """A step of the reference with copies of gradients, by default those of our parameters."""
        found = [p.grad for p in self.params] if grads is None else grads
        for twin, grad in zip(self.twins, found, strict=True):
            twin.grad = None if grad is None else grad.detach().to("cpu", copy=True)
        self.reference.step()

    def assert_same(self) -> None:
        """The weights and states of both are the same bits."""
        assert_same(self.ours, self.reference)


def stream_of(device: str) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """A new side stream, None on the CPU, and a function that makes it the current one."""
    if device == "cpu":
        return None, nullcontext
    stream = torch.cuda.Stream()
    return stream, lambda: torch.cuda.stream(stream)


def replayable(device: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that does what run does: the replay of a CUDA graph, on the CPU run itself."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
