"""Model families: functions from a transformers configuration to the shapes of the parameters.

Names and shapes are those of the family's state dict. Required keys are read with ``config[...]``;
other keys have the defaults of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .shapes import BIAS, CONV, EMBEDDING, MATRIX, NORM, Shape

Config = Mapping[str, Any]


def _linear(name: str, outputs: int, inputs: int, bias: bool = False) -> Iterator[Shape]:
    yield Shape(f"{name}.weight", (outputs, inputs), MATRIX)
    if bias:
        yield Shape(f"{name}.bias", (outputs,), BIAS)


def _layer_norm(name: str, width: int) -> Iterator[Shape]:
    yield Shape(f"{name}.weight", (width,), NORM)
    yield Shape(f"{name}.bias", (width,), NORM)


def gpt2(config: Config) -> Iterator[Shape]:
    """GPT-2. Its Conv1D weights are matrices of shape [inputs, outputs]."""
    width, layers = config["n_embd"], config["n_layer"]
    inner = config.get("n_inner") or 4 * width
    yield Shape("wte.weight", (config["vocab_size"], width), EMBEDDING)
    yield Shape("wpe.weight", (config["n_positions"], width), EMBEDDING)
    for i in range(layers):
        at = f"h.{i}"
        yield from _layer_norm(f"{at}.ln_1", width)
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            yield Shape(f"{at}.{name}.weight", (inputs, outputs), MATRIX)
            yield Shape(f"{at}.{name}.bias", (outputs,), BIAS)
        yield from _layer_norm(f"{at}.ln_2", width)
    yield from _layer_norm("ln_f", width)
    if not config.get("tie_word_embeddings", True):
        yield from _linear("lm_head", config["vocab_size"], width)


def _decoder(
    config: Config,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    qkv_bias: bool = False,
    head_norms: bool = False,
    tied: bool = False,
    head_dim: int | None = None,
) -> Iterator[Shape]:
    """Decoders with gated feed-forward layers and grouped-query attention."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or head_dim or width // heads
    bias = config.get("attention_bias", False)
    yield Shape("model.embed_tokens.weight", (config["vocab_size"], width), EMBEDDING)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, outputs in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
            yield from _linear(f"{at}.self_attn.{name}", outputs * size, width, qkv_bias or bias)
        yield from _linear(f"{at}.self_attn.o_proj", width, heads * size, bias)
        if head_norms:
            yield Shape(f"{at}.self_attn.q_norm.weight", (size,), NORM)
            yield Shape(f"{at}.self_attn.k_norm.weight", (size,), NORM)
        experts = config.get("num_local_experts") or 0
        if experts:
            yield from _linear(f"{at}.block_sparse_moe.gate", experts, width)
            for j in range(experts):
                expert = f"{at}.block_sparse_moe.experts.{j}"
                yield from _linear(f"{expert}.w1", inner, width)
                yield from _linear(f"{expert}.w2", width, inner)
                yield from _linear(f"{expert}.w3", inner, width)
        else:
            gated = config.get("mlp_bias", False)
            yield from _linear(f"{at}.mlp.gate_proj", inner, width, gated)
            yield from _linear(f"{at}.mlp.up_proj", inner, width, gated)
            yield from _linear(f"{at}.mlp.down_proj", width, inner, gated)
        for norm in norms:
            yield Shape(f"{at}.{norm}.weight", (width,), NORM)
    yield Shape("model.norm.weight", (width,), NORM)
    if not config.get("tie_word_embeddings", tied):
        yield from _linear("lm_head", config["vocab_size"], width)


def llama(config: Config) -> Iterator[Shape]:
    """Llama, Mistral and Mixtral."""
    return _decoder(config)


def qwen2(config: Config) -> Iterator[Shape]:
    """Qwen 1.5, 2 and 2.5: biases on the query, key and value projections."""
    return _decoder(config, qkv_bias=True)


def qwen3(config: Config) -> Iterator[Shape]:
    """Qwen 3: norms on query and key instead of biases."""
    return _decoder(config, head_norms=True, head_dim=128)


def gemma(config: Config) -> Iterator[Shape]:
    """Gemma: the head is tied to the embedding."""
    return _decoder(config, tied=True, head_dim=256)


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gemma2(config: Config) -> Iterator[Shape]:
    """Gemma 2: a norm before and after attention, and before and after the feed-forward layer."""
    return _decoder(config, norms=_SANDWICH, tied=True, head_dim=256)


def _encoder(config: Config, attention: str, norms: tuple[str, str]) -> Iterator[Shape]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{at}.attention.{attention}.{name}", width, width, True)
        yield from _linear(f"{at}.attention.output.dense", width, width, True)
        yield from _linear(f"{at}.intermediate.dense", inner, width, True)
        yield from _linear(f"{at}.output.dense", width, inner, True)
        for norm in norms:
            yield from _layer_norm(f"{at}.{norm}", width)


def bert(config: Config) -> Iterator[Shape]:
    """BERT with the pooler, without a task head."""
    width = config["hidden_size"]
    for name, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config.get("type_vocab_size", 2)),
    ):
        yield Shape(f"embeddings.{name}_embeddings.weight", (rows, width), EMBEDDING)
    yield from _layer_norm("embeddings.LayerNorm", width)
    yield from _encoder(config, "self", ("attention.output.LayerNorm", "output.LayerNorm"))
    yield from _linear("pooler.dense", width, width, True)


def vit(config: Config) -> Iterator[Shape]:
    """ViT with the classifier; 1000 classes unless the configuration defines labels."""
    width, patch, image = config["hidden_size"], config["patch_size"], config["image_size"]
    colours = config.get("num_channels", 3)
    yield Shape("embeddings.cls_token", (1, 1, width), EMBEDDING)
    positions = (1, (image // patch) ** 2 + 1, width)
    yield Shape("embeddings.position_embeddings", positions, EMBEDDING)
    yield Shape("embeddings.projection.weight", (width, colours, patch, patch), CONV)
    yield Shape("embeddings.projection.bias", (width,), BIAS)
    yield from _encoder(config, "attention", ("layernorm_before", "layernorm_after"))
    yield from _layer_norm("layernorm", width)
    yield from _linear("classifier", _labels(config), width, True)


def resnet(config: Config) -> Iterator[Shape]:
    """ResNet with the classifier. Running statistics are buffers, not parameters."""
    sizes, depths = config["hidden_sizes"], config["depths"]
    stem, bottleneck = config.get("embedding_size", 64), config.get("layer_type") != "basic"

    def conv(name: str, outputs: int, inputs: int, size: int) -> Iterator[Shape]:
        yield Shape(f"{name}.convolution.weight", (outputs, inputs, size, size), CONV)
        yield from _layer_norm(f"{name}.normalization", outputs)

    yield from conv("embedder.embedder", stem, config.get("num_channels", 3), 7)
    inputs = stem
    for stage, (width, depth) in enumerate(zip(sizes, depths, strict=True)):
        for i in range(depth):
            at = f"encoder.stages.{stage}.layers.{i}"
            # The first layer of every stage except the first halves the image size.
            if inputs != width or (i == 0 and stage > 0):
                yield from conv(f"{at}.shortcut", width, inputs, 1)
            inner = width // 4 if bottleneck else width
            steps = [(inner, inputs, 1), (inner, inner, 3), (width, inner, 1)]
            if not bottleneck:
                steps = [(inner, inputs, 3), (width, inner, 3)]
            for j, (outputs, channels, size) in enumerate(steps):
                yield from conv(f"{at}.layer.{j}", outputs, channels, size)
            inputs = width
    yield from _linear("classifier.1", _labels(config), inputs, True)


def _labels(config: Config) -> int:
    return int(config.get("num_labels") or len(config.get("id2label") or ()) or 1000)


FAMILIES: dict[str, Callable[[Config], Iterator[Shape]]] = {
    "bert": bert,
    "gemma": gemma,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "mixtral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "resnet": resnet,
    "vit": vit,
}
"""By the ``model_type`` of a transformers configuration."""
