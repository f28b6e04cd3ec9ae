"""Other libraries' optimizers, measured where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .cases import CLASSES, OPTIONS, Case
from .providers import (
    AS_WEIGHTS,
    BLOCKS,
    COMPILED,
    CPU,
    CUDA,
    EVERYWHERE,
    FP32_CORRECTION,
    ONE_EACH,
    Make,
    Provider,
    named,
)

ONE_BYTE, HALF_BYTE = frozenset({"mx8", "dynamic8"}), frozenset({"mx4"})
_SIZED = AS_WEIGHTS | {("bf16", "fp32")}


def _deepspeed_cpu(module: str, name: str, **fixed: Any) -> Make:
    def make(_: Any, params: list[torch.Tensor], case: Case, device: str) -> Any:
        options: dict[str, Any] = {**OPTIONS[case.rule], **fixed}
        if case.rule == "adamw":
            options["fp32_optimizer_states"] = case.states == "fp32"
        return getattr(importlib.import_module(module), name)(params, **options)

    return make


def _flash(name: str) -> Make:
    """Its formats of its own on a GPU; on a CPU it has none, and steps in the weights' dtype."""

    def make(module: Any, params: list[torch.Tensor], case: Case, device: str) -> Any:
        own = case.states in BLOCKS
        bits = 24 if case.weights == "split8" else None
        more = {"quantize": own, "master_weight_bits": bits, "fused": device == "cuda"}
        return getattr(module, name)(params, **OPTIONS[case.rule], **more)

    return make


def _flash_provider(name: str, compared: frozenset[str], devices: frozenset[str]) -> Provider:
    return Provider(
        name,
        "flashoptim",
        "flashoptim",
        {"adamw": _flash("FlashAdamW"), "lion": _flash("FlashLion"), "sgd": _flash("FlashSGD")},
        devices,
        frozenset() if compared else frozenset({("fp32", "fp32")}),
        kept=frozenset({"split8"}),
        most_tensors=ONE_EACH,
        slack=FP32_CORRECTION,
        compared=compared,
        state_bytes=1 + 2 / 32,  # blocks of 32 with an fp16 scale
    )


def _bitsandbytes(bits: int) -> dict[str, Make]:
    return {rule: named(f"{name}{bits}bit") for rule, name in CLASSES.items()}


def _torchao(name: str, cls: str, compared: frozenset[str], state_bytes: float) -> Provider:
    return Provider(
        name,
        "torchao",
        "torchao.optim",
        {"adamw": named(cls)},
        formats=frozenset() if compared else frozenset({("fp32", "fp32")}),
        most_tensors=COMPILED,
        slack=FP32_CORRECTION,
        compared=compared,
        state_bytes=state_bytes,
    )


PEERS = [
    Provider(
        "deepspeed-cpu",
        "deepspeed",
        "deepspeed.ops",
        {
            "adamw": _deepspeed_cpu("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=True),
            "lion": _deepspeed_cpu("deepspeed.ops.lion", "DeepSpeedCPULion"),
            "adagrad": _deepspeed_cpu("deepspeed.ops.adagrad", "DeepSpeedCPUAdagrad"),
        },
        CPU,
        frozenset(_SIZED),
        slack=FP32_CORRECTION,
        own_threads=True,
    ),
    Provider(
        "deepspeed-cuda",
        "deepspeed",
        "deepspeed.ops.adam",
        {"adamw": named("FusedAdam", adam_w_mode=True)},
        CUDA,
        AS_WEIGHTS,
        slack=FP32_CORRECTION,
    ),
    Provider(
        "bitsandbytes",
        "bitsandbytes",
        "bitsandbytes.optim",
        _bitsandbytes(32),
        formats=frozenset({("fp32", "fp32"), ("bf16", "fp32")}),
        most_tensors=ONE_EACH,
        slack=2 * FP32_CORRECTION,  # 1.3e-4 seen on an H200, with fast powers
    ),
    # Its blocks are of 256, with an fp32 scale.
    Provider(
        "bitsandbytes-8bit",
        "bitsandbytes",
        "bitsandbytes.optim",
        _bitsandbytes(8),
        formats=frozenset(),
        most_tensors=ONE_EACH,
        slack=FP32_CORRECTION,
        compared=BLOCKS,
        state_bytes=1 + 4 / 256,
    ),
    # The one of its classes that keeps fp32 states: the same step, compiled by torch.compile.
    _torchao("torchao", "_AdamW", frozenset(), 4),
    _torchao("torchao-8bit", "AdamW8bit", ONE_BYTE, 1 + 4 / 256),
    _torchao("torchao-4bit", "AdamW4bit", HALF_BYTE, 0.5 + 4 / 128),
    _flash_provider("flashoptim", frozenset(), EVERYWHERE),
    _flash_provider("flashoptim-8bit", ONE_BYTE, CUDA),
    Provider(
        "optimi",
        "torch-optimi",
        "optimi",
        {"adamw": named("AdamW"), "lion": named("Lion"), "sgd": named("SGD")},
        most_tensors=ONE_EACH,
    ),
    Provider(
        "lion-pytorch",
        "lion-pytorch",
        "lion_pytorch",
        {"lion": named("Lion")},
        most_tensors=ONE_EACH,
    ),
]
