"""Activations of transformers: the tensors saved for the backward pass, by a formula.

For t = batch * sequence tokens, elements of e bytes, width h, a heads and k key-value heads of size
d, and a feed-forward layer of width f, a block saves

    norms      each RMS norm t*h*(4 + 2*e); each layer norm 2*t*h*e
    attention  sdpa: t*(2*a*d + 2*k*d)*e + 4*t*a; eager: 4*t*a*d*e + t*a*sequence*w, where w is the
               bytes of the saved attention weights: 4 in fp32, 4 + e in 16 bits
    mlp        gated: 4*t*f*e; else c*t*f*e with c = 1 for relu, 5 for gelu_new, 2 for others

With checkpointing, a block saves its input, t*h*e, and all of this again in its own backward pass.
The backward pass of a block also holds two gradients of t*f*e and the gradient of its last matrix,
h*f*e. The loss holds 12*t*V bytes for V tokens in the vocabulary: log-probabilities and two
gradients in fp32. The gradient of an embedding that is also the head exists from the start of the
backward pass. Dropout is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .models.shapes import MATRIX, NORM, Model, Shape
from .training_peak import Schedule, block_of

ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Sample:
    """What one GPU computes in a forward and backward pass.

    Attributes:
        batch: sequences.
        sequence: tokens of a sequence.
        checkpointing: whether each block stores its input only and is computed again in the
            backward pass.
        attention: "sdpa" (scaled_dot_product_attention, also FlashAttention) or "eager", which
            stores the attention weights.
    """

    batch: int
    sequence: int
    checkpointing: bool = False
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"sample: {name} must be an integer of at least 1; got {value!r}")
        if self.attention not in ATTENTION:
            raise ValueError(
                f"sample: attention must be one of {', '.join(ATTENTION)}; got {self.attention!r}"
            )


_COPIES = {"relu": 1, "gelu_new": 5}


def _norms(shapes: Sequence[Shape], width: int, tokens: int, size: int) -> int:
    """Bytes that the norms of some parameters save; those over heads count with their width."""
    weights = [s for s in shapes if s.kind == NORM and not s.name.endswith("bias")]
    layer = any(s.kind == NORM and s.name.endswith("bias") for s in shapes)
    each = 2 * size if layer else 4 + 2 * size
    return sum(tokens * width * each for s in weights if s.numel == width)


def _block(
    shapes: Sequence[Shape], config: Mapping[str, Any], sample: Sample, size: int, tp: int
) -> tuple[int, int]:
    """(bytes that a block saves, bytes of the gradients in its backward pass)."""
    tokens, width = sample.batch * sample.sequence, config["hidden_size"]
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or width // heads
    if sample.attention == "sdpa":
        attention = tokens * ((2 * heads + 2 * groups) * dim * size + 4 * heads)
    else:
        wide = 4 if size == 4 else 4 + size
        attention = tokens * (4 * heads * dim * size + heads * sample.sequence * wide)
    # A norm over the heads of queries and keys.
    over_heads = [s for s in shapes if s.kind == NORM and s.numel == dim != width]
    attention += len(over_heads) and tokens * (heads + groups) * dim * (4 + 2 * size)
    inner = config["intermediate_size"]
    into = sum(s.shape[0] for s in shapes if s.kind == MATRIX and s.shape[0] in (inner, 2 * inner))
    copies = 4 if into >= 2 * inner else _COPIES.get(config.get("hidden_act") or "", 2)
    mlp = copies * tokens * inner * size
    saved = _norms(shapes, width, tokens, size) + (attention + mlp) // tp
    # The gradient of the last matrix is complete while the activations still exist.
    return saved, (2 * tokens + width) * inner * size // tp


def with_activations(
    plan: Schedule, model: Model, sample: Sample, size: int, tp: int = 1
) -> Schedule:
    """A copy of a schedule that counts the activations of a sample.

    Args:
        plan: the schedule of the model.
        model: the model; its ``config`` has the sizes.
        sample: the batch.
        size: bytes per element of the activations.
        tp: tensor parallel ranks, among which attention and feed-forward layers are divided.

    Raises:
        ValueError: the formula does not cover the model.
    """
    config = model.config
    needed = ("hidden_size", "num_attention_heads", "intermediate_size")
    experts = model.ep_plan or config.get("num_local_experts")
    if any(type(config.get(key)) is not int for key in needed) or experts:
        raise ValueError(
            f"sample: the activations of {model.name} cannot be predicted: the formula needs a "
            f"transformer without experts and a configuration with {', '.join(needed)}"
        )
    tokens, width = sample.batch * sample.sequence, config["hidden_size"]
    groups: dict[str, list[Shape]] = {}
    before: list[Shape] = []
    after: list[Shape] = []
    for shape in model.shapes:
        key = block_of(shape.name)
        part = after if groups else before
        (part if key is None else groups.setdefault(key, [])).append(shape)
    blocks = []
    for unit, shapes in zip(plan.blocks, groups.values(), strict=True):
        saved, working = _block(shapes, config, sample, size, tp)
        if sample.checkpointing:
            saved, working = tokens * width * size, working + saved
        blocks.append(replace(unit, activations=saved, working=working))
    logits = config.get("head") or 0
    untied = any(s.kind == MATRIX and s.shape[0] == logits for s in after)
    tied = 0 if untied else logits * width * size
    head = _norms(after, width, tokens, size) + 12 * tokens * logits
    first = _norms(before, width, tokens, size)
    return replace(
        plan,
        first=replace(plan.first, activations=first),
        blocks=tuple(blocks),
        last=replace(plan.last, activations=head, gradients=plan.last.gradients + tied),
    )
