"""Optimizer recommendations: published rules of thumb, checked against predicted bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from .models.shapes import MATRIX, Model, Shape
from .report import MemoryReport
from .scenarios import Candidate, Terms, candidate, predicted, report
from .simulate import CannotSimulateError
from .sizes import show
from .variants import Variant, parse

MOST_RANKS = 1024
TASKS = ("pretrain", "finetune", "lora", "qlora")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight in QLoRA's NF4, with an 8-bit scale for each 64 weights and an fp32 scale for
each 256 of those scales. Source: Dettmers et al., "QLoRA" (2023), section 3, double
quantisation."""


MEASURED = 254_592
"""The number of parameters of the largest model whose loss was measured for each format."""

CAUTION = (
    f"caution: 4-bit states were compared with fp32 only in a model of {MEASURED:,} parameters, "
    "over 500 steps that were 9 % longer; try them on a short run first"
)
"""docs/training.md has the measurements."""


@dataclass(frozen=True)
class Change:
    """A change of options that makes an optimizer fit.

    Attributes:
        words: the change, as written on the command line.
        peak, host: predicted bytes on the device and on the host after the change.
    """

    words: str
    peak: int
    host: int = 0

    def __str__(self) -> str:
        away = f", {show(self.host)} on the host" if self.host else ""
        caution = f" ({CAUTION})" if "mx4" in self.words else ""
        return f"{self.words} would fit: {show(self.peak)}{away}{caution}"


def _smaller(variant: Variant) -> Iterator[tuple[str, ...]]:
    """Yields combinations of options that reduce memory, in the order in which they are proposed.

    8-bit states and smaller weight companions come first: their losses were compared with fp32. A
    paged step also transfers the states to the host and back. 4-bit states come last; see CAUTION.
    """
    now = STATE_FORMATS[variant.states].bytes
    small = ["mx8", "mx4"]
    if variant.options.get("centered") or variant.made.rule.formats:
        small = ["bf16"]
    states = [(name,) for name in small if STATE_FORMATS[name].bytes < now]
    extra = {"master": ("split16", "split8"), "kahan": ("split8",), "split16": ("split8",)}
    weights = [(name,) for name in extra.get(variant.weights, ())]
    kept = [*states, *weights, *(s + w for s in states for w in weights)]
    four = [words for words in kept if "mx4" in words]
    eight = [words for words in kept if words not in four]
    yield from eight
    if not variant.paged:
        # Smaller states are paged first, because fewer bytes are transferred.
        yield from ((*words, "paged") for words in (*eight, ()))
    yield from four
    if not variant.paged:
        yield from ((*words, "paged") for words in four)


def cheapest_change(choice: Candidate, model: Model, terms: Terms, limit: int) -> Change | None:
    """The first change that reduces an optimizer to at most ``limit`` bytes on each GPU.

    The order is: 8-bit states, paging, 4-bit states, FSDP2 instead of ZeRO-1, more GPUs. For an
    optimizer of another library, the onepass optimizer with the same rule is tried.

    Returns:
        The change; None if no change is sufficient.
    """
    name = "adamw"
    if choice.variant is not None:
        name = choice.variant.name
    elif choice.peer is not None:
        name = choice.peer.variant
    variant = parse(name)
    assert variant is not None
    options = [] if choice.variant is not None else [()]
    for words in (*options, *_smaller(variant)):
        weights = [WEIGHT_FORMATS[word] for word in words if word in WEIGHT_FORMATS]
        if any(terms.dtype not in form.codes for form in weights):
            continue
        try:
            found = predicted(Candidate("", variant=variant.plus(*words)), model, terms)
        except (CannotSimulateError, ValueError):  # incompatible options, or Muon over shards
            continue
        if found.peak <= limit:
            words_ = "+".join(words)
            shown = f"+{words_}" if choice.variant is not None else variant.plus(*words).name
            return Change(shown, found.peak, found.host)
    mesh = terms.mesh
    counts = [n for power in range(1, 11) if (n := mesh.fsdp << power) * mesh.dp <= MOST_RANKS]
    meshes = [replace(mesh, fsdp=n) for n in counts]
    if mesh.stage < 3 and mesh.fsdp > 1:
        # ZeRO-1 does not shard weights and gradients, whatever the number of GPUs.
        meshes.insert(0, replace(mesh, stage=3))
    further = [(f"--mesh {each}", replace(terms, mesh=each)) for each in meshes]
    for words_, others in further:
        try:
            found = predicted(choice, model, others)
        except (CannotSimulateError, ValueError):
            return None
        if found.peak <= limit:
            return Change(words_, found.peak, found.host)
    return None


def lora(model: Model, rank: int, bits: float | None = None) -> Model:
    """The model with frozen parameters and LoRA adapters on all matrices but head and embeddings.

    A matrix W becomes W + B A with trained A [rank, inputs] and B [outputs, rank].
    Source: Hu et al., "LoRA" (2021); adapters on every layer as in QLoRA.

    Args:
        model: the model to adapt.
        rank: the rank of the adapters.
        bits: bits per element of the frozen matrices; None for the dtype of the run.
    """
    shapes: list[Shape] = []
    for shape in model.shapes:
        adapted = shape.kind == MATRIX and not shape.name.startswith("lm_head")
        shapes.append(replace(shape, trained=False, bits=bits if adapted else None))
        if adapted:
            outputs, inputs = shape.shape[0], shape.numel // shape.shape[0]
            base = shape.name.removesuffix(".weight")
            shapes.append(Shape(f"{base}.lora_A.weight", (rank, inputs), MATRIX))
            shapes.append(Shape(f"{base}.lora_B.weight", (outputs, rank), MATRIX))
    return model.mapped(shapes)


@dataclass
class Advice:
    """A recommendation.

    Attributes:
        chosen: the report of the recommended optimizer; None if none fits.
        reports: the reports of all candidates, in order of preference.
        reasons: sentences that explain the choice; the first sentence states the choice.
        model: the model as trained; for lora and qlora it includes the adapters.
    """

    chosen: MemoryReport | None
    reports: list[MemoryReport]
    reasons: list[str] = field(default_factory=list)
    model: Model | None = None


def _preferences(model: Model, terms: Terms, task: str) -> tuple[list[str], list[str]]:
    """(optimizers in order of preference, the reasons for this order)."""
    bf16 = str(terms.dtype) == "torch.bfloat16"
    split8 = "+split8" if bf16 else ""
    split16 = "+split16" if bf16 else ""
    if task in ("lora", "qlora"):
        return ["adamw", "adamw8bit", "pagedadamw8bit", "pagedlion8bit"], [
            "adapters have few parameters, so their states are small: AdamW with fp32 states comes "
            "first, 8-bit and paged states only if it does not fit (QLoRA pages the states of "
            "AdamW)",
        ]
    why = []
    if model.convolutional:
        names = [f"sgd+momentum{split16}", f"sgd8bit+momentum{split8}"]
        names += [f"sgd8bit+momentum{split8}+paged"]
        why.append(
            "convolutional networks: SGD with momentum generalises at least as well as adaptive "
            "methods (Wilson et al. 2017) and has one moment instead of two"
        )
    else:
        names = [f"adamw{split16}", f"adamw8bit{split8}", f"pagedadamw8bit{split8}"]
        names += [f"lion8bit{split8}", f"pagedlion8bit{split8}", f"adamw4bit{split8}"]
        if task == "finetune":
            why.append("fine-tuning: AdamW comes first, because most models were trained with it")
        else:
            why.append(
                "transformers: AdamW, because adaptive steps cope with the heavy-tailed noise of "
                "their gradients (Zhang et al. 2020)"
            )
        why.append(
            "Lion is another algorithm, with another learning rate and decay, and comes after AdamW"
        )
    why.append(
        "a paged step also transfers the states to the host and back, so paging comes after 8-bit "
        "states on the device"
    )
    if bf16:
        why.append(
            "bf16 weights store more bits in a companion (split16: exactly fp32; split8: 24 bits); "
            "without it, updates below 1/256 of a weight are lost"
        )
    return names, why


def evidence(variant: Variant, model: Model) -> str:
    """What the measurements of docs/training.md say about the formats of a choice; may be empty."""
    if variant.states == "mx4":
        return CAUTION
    if variant.states == "fp32":
        return ""
    rule = variant.made.rule.name
    if variant.states != "mx8" or rule not in ("adam", "lion"):
        return f"evidence: the loss of {variant.name} was not compared with fp32 states"
    times = model.trained / MEASURED
    larger = f"; this model trains {times:,.0f} times as many" if times >= 2 else ""
    return (
        f"evidence: with 8-bit states, the loss stays within the spread of seeds of fp32 in a "
        f"model of {MEASURED:,} parameters over 500 steps (docs/training.md){larger}"
    )


def recommend(
    model: Model, terms: Terms, limit: int, reserve: int, task: str, rank: int = 16
) -> Advice:
    """Recommends the first optimizer, in order of preference, that fits.

    Args:
        model: the model to train.
        terms: the settings of the run.
        limit: bytes of memory of one GPU.
        reserve: bytes of ``limit`` to leave for activations and the CUDA runtime.
        task: one of TASKS.
        rank: the rank of LoRA adapters.
    """
    whole = model
    if task in ("lora", "qlora"):
        model = lora(model, rank, NF4_BITS if task == "qlora" else None)
    names, why = _preferences(model, terms, task)
    reports = [report(candidate(name), model, terms) for name in names]
    advice = Advice(None, reports, model=model)
    room = limit - reserve
    for found in reports:
        assert found.predicted is not None
        if found.predicted.peak <= room:
            advice.chosen = found
            break
    if advice.chosen is not None:
        assert advice.chosen.predicted is not None
        peak = advice.chosen.predicted.peak
        first = (
            f"{advice.chosen.name}: {show(peak)} of {show(limit)} at the peak of the step, "
            f"{show(limit - peak)} left for activations and the runtime"
        )
        before = reports[: reports.index(advice.chosen)]
        refused = [
            f"{r.name} takes {show(r.predicted.peak)}, {show(r.predicted.peak - room)} over"
            for r in before
            if r.predicted
        ]
        variant = parse(advice.chosen.name)
        known = evidence(variant, model) if variant is not None else ""
        advice.reasons = [first, *([known] if known else []), *why]
        if refused:
            advice.reasons.insert(
                1, f"preferred, but larger than {show(room)}: {'; '.join(refused)}"
            )
        return advice
    advice.reasons = [f"nothing fits in {show(room)} for this task", *why]
    change = cheapest_change(candidate(names[1]), model, terms, room)
    if change is not None:
        advice.reasons.insert(1, f"{names[1]} with {change}")
    later = TASKS[TASKS.index(task) + 1 :]
    for other in [t for t in later if t in ("lora", "qlora")]:
        smaller = recommend(whole, terms, limit, reserve, other, rank)
        if smaller.chosen is not None and not model.convolutional:
            advice.reasons.insert(1, f"--task {other} would fit: {smaller.reasons[0]}")
            break
    return advice
