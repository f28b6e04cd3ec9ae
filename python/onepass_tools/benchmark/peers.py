"""Providers for the optimizers of other libraries, measured if they are installed."""

from __future__ import annotations

from typing import Any

import torch

from onepass.integrations.other_libraries import (
    BITSANDBYTES,
    CLASSES,
    DEEPSPEED,
    FLASHOPTIM,
    LION_PYTORCH,
    OPTIMI,
    TORCHAO,
    Library,
    OptimizerClass,
)

from .cases import OPTIONS, Case
from .provider import (
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
    made,
)

ONE_BYTE, HALF_BYTE = frozenset({"mx8", "dynamic8"}), frozenset({"mx4"})
_SIZED = AS_WEIGHTS | {("bf16", "fp32")}


def _rules(library: Library, suffix: str = "") -> dict[str, Make]:
    """Rule -> the class of a library whose name is the onepass name plus a suffix."""
    return {
        peer.twin: made(peer)
        for peer in CLASSES.values()
        if peer.library == library
        and peer.name.lower() == peer.twin + suffix
        and peer.twin in OPTIONS
    }


def _deepspeed_cpu(name: str) -> Make:
    """A DeepSpeed CPU optimizer: states have the weights' dtype; only Adam can use fp32 instead."""

    def make(params: list[torch.Tensor], case: Case, device: str) -> Any:
        options: dict[str, Any] = {**OPTIONS[case.rule]}
        if case.rule == "adamw":
            options["fp32_optimizer_states"] = case.states == "fp32"
        return CLASSES[f"deepspeed.{name}"].make(params, **options)

    return make


def _flash(peer: OptimizerClass) -> Make:
    """A FlashOptim optimizer: own formats on a GPU, the dtype of the weights on a CPU."""

    def make(params: list[torch.Tensor], case: Case, device: str) -> Any:
        own = case.states in BLOCKS
        bits = 24 if case.weights == "split8" else None
        more = {"quantize": own, "master_weight_bits": bits, "fused": device == "cuda"}
        return peer.make(params, **OPTIONS[case.rule], **more)

    return make


def _flash_provider(name: str, compared: frozenset[str], devices: frozenset[str]) -> Provider:
    return Provider(
        name,
        FLASHOPTIM,
        {peer.twin: _flash(peer) for peer in CLASSES.values() if peer.library == FLASHOPTIM},
        devices,
        frozenset() if compared else frozenset({("fp32", "fp32")}),
        kept=frozenset({"split8"}),
        most_tensors=ONE_EACH,
        slack=FP32_CORRECTION,
        compared=compared,
        state_bytes=1 + 2 / 32,  # blocks of 32 with an fp16 scale
    )


def _torchao(name: str, cls: str, compared: frozenset[str], state_bytes: float) -> Provider:
    return Provider(
        name,
        TORCHAO,
        {"adamw": made(CLASSES[f"torchao.{cls}"])},
        formats=frozenset() if compared else frozenset({("fp32", "fp32")}),
        most_tensors=COMPILED,
        slack=FP32_CORRECTION,
        compared=compared,
        state_bytes=state_bytes,
    )


PEERS = [
    Provider(
        "deepspeed-cpu",
        DEEPSPEED,
        {
            "adamw": _deepspeed_cpu("DeepSpeedCPUAdam"),
            "lion": _deepspeed_cpu("DeepSpeedCPULion"),
            "adagrad": _deepspeed_cpu("DeepSpeedCPUAdagrad"),
        },
        CPU,
        frozenset(_SIZED),
        slack=FP32_CORRECTION,
        own_threads=True,
    ),
    Provider(
        "deepspeed-cuda",
        DEEPSPEED,
        {"adamw": made(CLASSES["deepspeed.FusedAdam"])},
        CUDA,
        AS_WEIGHTS,
        slack=FP32_CORRECTION,
    ),
    Provider(
        "bitsandbytes",
        BITSANDBYTES,
        _rules(BITSANDBYTES, suffix="32bit"),
        formats=frozenset({("fp32", "fp32"), ("bf16", "fp32")}),
        most_tensors=ONE_EACH,
        slack=2 * FP32_CORRECTION,  # fast pow() causes an error of 1.3e-4, measured on an H200
    ),
    # bitsandbytes uses blocks of 256 with an fp32 scale.
    Provider(
        "bitsandbytes-8bit",
        BITSANDBYTES,
        _rules(BITSANDBYTES, suffix="8bit"),
        formats=frozenset(),
        most_tensors=ONE_EACH,
        slack=FP32_CORRECTION,
        compared=BLOCKS,
        state_bytes=1 + 4 / 256,
    ),
    # torchao's only class with fp32 states; torch.compile compiles the same step.
    _torchao("torchao", "_AdamW", frozenset(), 4),
    _torchao("torchao-8bit", "AdamW8bit", ONE_BYTE, 1 + 4 / 256),
    _torchao("torchao-4bit", "AdamW4bit", HALF_BYTE, 0.5 + 4 / 128),
    _flash_provider("flashoptim", frozenset(), EVERYWHERE),
    _flash_provider("flashoptim-8bit", ONE_BYTE, CUDA),
    Provider(
        "optimi",
        OPTIMI,
        _rules(OPTIMI),
        most_tensors=ONE_EACH,
    ),
    Provider(
        "lion-pytorch",
        LION_PYTORCH,
        _rules(LION_PYTORCH),
        most_tensors=ONE_EACH,
    ),
]
