"""Counts the compilations of Triton over a schedule; run by test_triton_compile.py.

A launch ends after Triton has looked up the compiled kernel, for a target that need not be present;
nothing reaches a device. The script prints the number of compilations and launches after each part
of the schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import onepass
from onepass.engine.backends import Entry
from onepass.engine.backends.triton import TritonBackend
from onepass.formats import NATIVE, STATE_FORMATS
from onepass.rules import RULES


class NoDevice:
    """Answers the questions that a launch asks the driver before it has a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_without_launching(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    launches.append(kwargs["grid"])
    return run(self, *args, **{**kwargs, "warmup": True})


launches: list[tuple[int]] = []
compilations: list[Any] = []
run = JITFunction.run
JITFunction.run = run_without_launching
driver.set_active(NoDevice())
triton.knobs.compilation.listener = lambda **event: compilations.append(event)
TritonBackend.unavailable = lambda self, device: ""


def train(sizes: list[int], steps: int, cls: Any = onepass.AdamW, **options: Any) -> None:
    """Takes steps in which all options change and every gradient is a new tensor."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "states": "bf16"}]
    optimizer = cls(groups, backend="triton", **options)
    kept = []
    for step in range(steps):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 * (step + i)
            group["weight_decay"] = 1e-2 / (step + 1)
            if "betas" in group:
                group["betas"] = (0.9 - 1e-3 * step, 0.99 + 1e-5 * step)
            if "eps" in group:
                group["eps"] = 1e-8 * (step + 1)
            group["maximize"] = step % 2 == 0
        if optimizer.max_grad_norm is not None:
            optimizer.max_grad_norm = 0.3 * step
        for param in params:
            param.grad = torch.ones_like(param)
            kept.append(param.grad)
        optimizer.step()


train([5, 16, 1025, 40_000], steps=50)
print(len(compilations), len(launches))
# Lists of other lengths and sizes: Triton specializes 1 and multiples of 16.
train([1, 1], steps=3)
train([16] * 32, steps=3)
train([7] * 33 + [100_000], steps=3)
print(len(compilations), len(launches))
# Another variant compiles another kernel, which shows that compilations are counted.
train([5, 5], steps=3, amsgrad=True)
print(len(compilations), len(launches))
# Clipping adds the kernel of the verdict, and another one that derives hyperparameters.
train([5, 5], steps=3, amsgrad=True, max_grad_norm=0.5)
print(len(compilations), len(launches))
# Norms of lists of different lengths, sizes and dtypes.
for number, dtypes in enumerate(
    [
        [torch.float32],
        [torch.float16],
        [torch.bfloat16] * 16,
        [torch.float32] * 17,
        [torch.half] * 9,
    ]
):
    grads = [torch.ones(10_000 * number + i, dtype=dtype) for i, dtype in enumerate(dtypes, 1)]
    form, rule = STATE_FORMATS["fp32"], RULES["sgd"]
    entries = [Entry(torch.empty_like(g), {}, form, NATIVE[g.dtype], rule, 0, 0, 0) for g in grads]
    backend = TritonBackend()
    prepared = backend.prepare(entries)
    assert backend.refresh(prepared, [entry.param for entry in entries], grads)
    backend.norm(prepared)
print(len(compilations), len(launches))
