"""Published models: configuration, number of parameters, and source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .families import FAMILIES
from .shapes import Model

HUB = "https://huggingface.co/"
VISION = "https://docs.pytorch.org/vision/stable/models/generated/torchvision.models."


@dataclass(frozen=True)
class Known:
    """A published model.

    Attributes:
        family: a key of FAMILIES.
        config: the configuration that the family's function reads.
        parameters: the exact published number of parameters: half the bytes of a 16-bit checkpoint
            (``total_size`` in its index), the count in its header, or torchvision's ``num_params``.
        source: the page with the configuration and the number of parameters.
    """

    family: str
    config: dict[str, Any]
    parameters: int
    source: str


def _gpt2(width: int, layers: int, parameters: int, name: str) -> Known:
    config = {"n_embd": width, "n_layer": layers, "n_positions": 1024, "vocab_size": 50257}
    return Known("gpt2", config, parameters, f"{HUB}openai-community/{name}")


def _decoder(
    family: str,
    sizes: tuple[int, int, int, int, int, int],
    parameters: int,
    source: str,
    **more: Any,
) -> Known:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    config = {**dict(zip(names, sizes, strict=True)), **more}
    return Known(family, config, parameters, HUB + source)


def _encoder(
    family: str, sizes: tuple[int, int, int], parameters: int, source: str, **more: Any
) -> Known:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    return Known(family, {**dict(zip(names, sizes, strict=True)), **more}, parameters, source)


_BERT = {"vocab_size": 30522, "max_position_embeddings": 512}
_TIED = {"tie_word_embeddings": True}
_STAGES = {"hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}
_BASIC = {"hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}

KNOWN: dict[str, Known] = {
    "gpt2": _gpt2(768, 12, 124_439_808, "gpt2"),
    "gpt2-medium": _gpt2(1024, 24, 354_823_168, "gpt2-medium"),
    "gpt2-large": _gpt2(1280, 36, 774_030_080, "gpt2-large"),
    "gpt2-xl": _gpt2(1600, 48, 1_557_611_200, "gpt2-xl"),
    "llama-2-7b": _decoder(
        "llama", (4096, 11008, 32, 32, 32, 32000), 6_738_415_616, "meta-llama/Llama-2-7b-hf"
    ),
    "llama-2-13b": _decoder(
        "llama", (5120, 13824, 40, 40, 40, 32000), 13_015_864_320, "meta-llama/Llama-2-13b-hf"
    ),
    "llama-2-70b": _decoder(
        "llama", (8192, 28672, 80, 64, 8, 32000), 68_976_648_192, "meta-llama/Llama-2-70b-hf"
    ),
    "llama-3-8b": _decoder(
        "llama", (4096, 14336, 32, 32, 8, 128256), 8_030_261_248, "meta-llama/Meta-Llama-3-8B"
    ),
    "llama-3-70b": _decoder(
        "llama", (8192, 28672, 80, 64, 8, 128256), 70_553_706_496, "meta-llama/Meta-Llama-3-70B"
    ),
    "llama-3.1-405b": _decoder(
        "llama", (16384, 53248, 126, 128, 8, 128256), 405_853_388_800, "meta-llama/Llama-3.1-405B"
    ),
    "llama-3.2-1b": _decoder(
        "llama", (2048, 8192, 16, 32, 8, 128256), 1_235_814_400, "meta-llama/Llama-3.2-1B", **_TIED
    ),
    "llama-3.2-3b": _decoder(
        "llama", (3072, 8192, 28, 24, 8, 128256), 3_212_749_824, "meta-llama/Llama-3.2-3B", **_TIED
    ),
    "mistral-7b": _decoder(
        "mistral", (4096, 14336, 32, 32, 8, 32000), 7_241_732_096, "mistralai/Mistral-7B-v0.1"
    ),
    "mixtral-8x7b": _decoder(
        "mixtral",
        (4096, 14336, 32, 32, 8, 32000),
        46_702_792_704,
        "mistralai/Mixtral-8x7B-v0.1",
        num_local_experts=8,
    ),
    "qwen2.5-0.5b": _decoder(
        "qwen2", (896, 4864, 24, 14, 2, 151936), 494_032_768, "Qwen/Qwen2.5-0.5B", **_TIED
    ),
    "qwen2.5-1.5b": _decoder(
        "qwen2", (1536, 8960, 28, 12, 2, 151936), 1_543_714_304, "Qwen/Qwen2.5-1.5B", **_TIED
    ),
    "qwen2.5-3b": _decoder(
        "qwen2", (2048, 11008, 36, 16, 2, 151936), 3_085_938_688, "Qwen/Qwen2.5-3B", **_TIED
    ),
    "qwen2.5-7b": _decoder(
        "qwen2", (3584, 18944, 28, 28, 4, 152064), 7_615_616_512, "Qwen/Qwen2.5-7B"
    ),
    "qwen2.5-14b": _decoder(
        "qwen2", (5120, 13824, 48, 40, 8, 152064), 14_770_033_664, "Qwen/Qwen2.5-14B"
    ),
    "qwen2.5-32b": _decoder(
        "qwen2", (5120, 27648, 64, 40, 8, 152064), 32_763_876_352, "Qwen/Qwen2.5-32B"
    ),
    "qwen2.5-72b": _decoder(
        "qwen2", (8192, 29568, 80, 64, 8, 152064), 72_706_203_648, "Qwen/Qwen2.5-72B"
    ),
    "qwen3-8b": _decoder("qwen3", (4096, 12288, 36, 32, 8, 151936), 8_190_735_360, "Qwen/Qwen3-8B"),
    "gemma-2b": _decoder(
        "gemma", (2048, 16384, 18, 8, 1, 256000), 2_506_172_416, "google/gemma-2b", head_dim=256
    ),
    "gemma-7b": _decoder(
        "gemma", (3072, 24576, 28, 16, 16, 256000), 8_537_680_896, "google/gemma-7b", head_dim=256
    ),
    "gemma-2-2b": _decoder(
        "gemma2", (2304, 9216, 26, 8, 4, 256000), 2_614_341_888, "google/gemma-2-2b", head_dim=256
    ),
    "gemma-2-9b": _decoder(
        "gemma2", (3584, 14336, 42, 16, 8, 256000), 9_241_705_984, "google/gemma-2-9b", head_dim=256
    ),
    "gemma-2-27b": _decoder(
        "gemma2",
        (4608, 36864, 46, 32, 16, 256000),
        27_227_128_320,
        "google/gemma-2-27b",
        head_dim=128,
    ),
    "vit-b-16": _encoder(
        "vit", (768, 3072, 12), 86_567_656, f"{VISION}vit_b_16.html", patch_size=16, image_size=224
    ),
    "vit-l-16": _encoder(
        "vit",
        (1024, 4096, 24),
        304_326_632,
        f"{VISION}vit_l_16.html",
        patch_size=16,
        image_size=224,
    ),
    "vit-h-14": _encoder(
        "vit",
        (1280, 5120, 32),
        632_045_800,
        f"{VISION}vit_h_14.html",
        patch_size=14,
        image_size=224,
    ),
    "resnet-18": Known(
        "resnet", {**_BASIC, "depths": [2, 2, 2, 2]}, 11_689_512, f"{VISION}resnet18.html"
    ),
    "resnet-50": Known(
        "resnet", {**_STAGES, "depths": [3, 4, 6, 3]}, 25_557_032, f"{VISION}resnet50.html"
    ),
    "resnet-101": Known(
        "resnet", {**_STAGES, "depths": [3, 4, 23, 3]}, 44_549_160, f"{VISION}resnet101.html"
    ),
    "bert-base": _encoder(
        "bert", (768, 3072, 12), 109_482_240, f"{HUB}google-bert/bert-base-uncased", **_BERT
    ),
    "bert-large": _encoder(
        "bert", (1024, 4096, 24), 335_141_888, f"{HUB}google-bert/bert-large-uncased", **_BERT
    ),
}
"""By the name that ``--model`` takes."""


def known(name: str) -> Model:
    """The published model with a name from KNOWN."""
    row = KNOWN[name]
    shapes = tuple(FAMILIES[row.family](row.config))
    return Model(name, shapes, row.source, row.parameters, config=_sizes(row))


def _sizes(row: Known) -> dict[str, Any]:
    """The sizes that the formula of activations needs; see :class:`Model`."""
    if row.family == "resnet":
        return {}
    found = {"hidden_act": "silu", "head": row.config.get("vocab_size", 0), **row.config}
    if row.family in ("bert", "vit"):
        found |= {"hidden_act": "gelu", "head": 0}
    if row.family == "gpt2":
        width = row.config["n_embd"]
        found |= {"hidden_act": "gelu_new", "hidden_size": width, "intermediate_size": 4 * width}
    # BERT, GPT-2 and ViT have heads of 64 elements, except ViT-H (80).
    found.setdefault("num_attention_heads", found["hidden_size"] // 64)
    return found
