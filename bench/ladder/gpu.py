"""The ladder of the GPU, in Triton: from one launch per tensor to the kernels of onepass.

Every rung uses the rule of onepass and returns its bits. With TRITON_INTERPRET=1 the rungs run on
CPU tensors, to check them; their times then mean nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import onepass
from onepass_tools.benchmark.cases import OPTIONS
from onepass_tools.benchmark.param_lists import ParamList

from .kernels import one_tensor, whole_list
from .rungs import Rung

CHUNK = 8192  # elements per program
COLUMNS = 5  # of the chunk table: four addresses and a count
NO_FUSION = {"enable_fp_fusion": False}  # the numerics contract: no fused multiply-add


@dataclass(frozen=True)
class Variant:
    """The arguments of a launch of whole_list.

    Attributes:
        name: name of the rung.
        block: elements that a program loads at once. A program has 256 threads, so each thread
            loads block / 256 elements of a tensor at once.
        vectors: whether loads and stores of full chunks are 16 bytes wide.
        evict: the eviction policy of loads and stores.
        persistent: whether each program processes several chunks, on a grid that depends on the
            number of multiprocessors.
    """

    name: str
    block: int
    vectors: bool = True
    evict: str = ""
    persistent: bool = False


VARIANTS = [
    Variant("one launch for the list", 256, vectors=False),
    Variant("vector loads: 16 bytes per thread and tensor in flight", 1024),
    Variant("32 bytes per thread and tensor in flight", 2048),
    Variant("64 bytes per thread and tensor in flight", 4096),
    Variant("32 bytes, cache lines marked evict_first", 2048, evict="evict_first"),
    Variant("32 bytes, persistent grid", 2048, persistent=True),
]


def rungs(params: ParamList, device: str = "cuda") -> list[Rung]:
    """The rungs of AdamW in fp32 over a list.

    The rungs of this file share their tensors and always use the hyperparameters of the first step.
    The rungs of onepass have tensors of their own.
    """
    options = OPTIONS["adamw"]
    beta1, beta2 = options["betas"]
    root = math.sqrt(1 - beta2)
    hyper = [options["lr"] * root / (1 - beta1), options["lr"] * options["weight_decay"]]
    hyper += [beta1, 1 - beta1, beta2, 1 - beta2, options["eps"] * root]
    row = torch.tensor(hyper, dtype=torch.float64).float().to(device)
    weights = params.normal(0.02, torch.float32, 1, device)
    grads = params.normal(0.01, torch.float32, 2, device)
    exp_avg = [torch.zeros_like(weight) for weight in weights]
    exp_avg_sq = [torch.zeros_like(weight) for weight in weights]
    tensors = list(zip(weights, grads, exp_avg, exp_avg_sq, strict=True))
    table = torch.tensor(
        [
            [*(t.data_ptr() + 4 * start for t in own), min(CHUNK, own[0].numel() - start)]
            for own in tensors
            for start in range(0, own[0].numel(), CHUNK)
        ],
        dtype=torch.int64,
    ).to(device)
    chunks = len(table)
    processors = 2
    if device == "cuda":
        processors = torch.cuda.get_device_properties(0).multi_processor_count

    def each(warps: int = 8) -> None:
        for own in tensors:
            numel = own[0].numel()
            one_tensor[(-(-numel // 256),)](*own, row, numel, 256, num_warps=warps, **NO_FUSION)

    # kept: holds references to the tensors, because the table has only their addresses.
    def launch(variant: Variant, kept: Any = tensors) -> None:
        grid = min(chunks, 2 * processors) if variant.persistent else chunks
        whole_list[(grid,)](
            table, row, chunks, variant.block, variant.vectors, variant.evict, variant.persistent,
            CHUNK, COLUMNS, num_warps=8, **NO_FUSION,
        )  # fmt: skip

    found = [Rung("one launch per tensor, one element per thread", each, weights)]
    for variant in VARIANTS:
        found.append(Rung(variant.name, lambda v=variant: launch(v), weights))  # type: ignore[misc]
    return found + _product(params, grads, device)


def _product(params: ParamList, grads: list[torch.Tensor], device: str) -> list[Rung]:
    """The rungs of onepass itself: each GPU backend that is available."""
    found = []
    for backend in ("triton", "cuda"):
        if onepass.backends.BACKENDS[backend].unavailable(torch.device(device)):
            continue
        own: list[Any] = [
            torch.nn.Parameter(x) for x in params.normal(0.02, torch.float32, 1, device)
        ]
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad
        optimizer = onepass.AdamW(own, **OPTIONS["adamw"], backend=backend)
        found.append(Rung(f"onepass, {backend}", optimizer.step, own))
    return found
