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

MOST_SHARDS = 1024
TASKS = ("pretrain", "finetune", "lora", "qlora")
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight in QLoRA's NF4, with an 8-bit scale for each 64 weights and an fp32 scale for
each 256 of those scales. Source: Dettmers et al., "QLoRA" (2023), section 3, double
quantisation."""


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
        return f"{self.words} would fit: {show(self.peak)}{away}"


def _smaller(variant: Variant) -> Iterator[tuple[str, ...]]:
    """Yields combinations of options that reduce memory, the cheapest first.

    Smaller states make a step faster, so 8-bit and then 4-bit states come first. Smaller weight
    companions are next. Paging comes last, because a paged step waits for the transfer to the host.
    """
    now = STATE_FORMATS[variant.states].bytes
    states = [(name,) for name in ("mx8", "mx4") if STATE_FORMATS[name].bytes < now]
    if variant.options.get("centered") or variant.made.rule.formats:
        states = [("bf16",)] if now > 2 else []
    extra = {"master": ("split16", "split8"), "kahan": ("split8",), "split16": ("split8",)}
    weights = [(name,) for name in extra.get(variant.weights, ())]
    kept = [*states, *weights, *(s + w for s in states for w in weights)]
    yield from kept
    if not variant.paged:
        # 8-bit states transfer a quarter of the bytes of fp32; 4-bit states also cost accuracy.
        eight = [words for words in kept if "mx8" in words]
        others = [words for words in kept if words not in eight]
        yield from ((*words, "paged") for words in (*eight, (), *others))


def cheapest_change(choice: Candidate, model: Model, terms: Terms, limit: int) -> Change | None:
    """The first change that reduces an optimizer to at most ``limit`` bytes on each GPU.

    The order is: smaller formats, paging, FSDP2 instead of ZeRO-1, more GPUs. For an optimizer of
    another library, the onepass optimizer with the same rule is tried.

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
    counts = [terms.shards << power for power in range(1, 11)]
    further = [(f"--shards {n}", replace(terms, shards=n)) for n in counts if n <= MOST_SHARDS]
    if terms.sharding == "zero1" and terms.shards > 1:
        # ZeRO-1 does not shard weights and gradients, whatever the number of GPUs.
        further.insert(0, ("--sharding fsdp2", replace(terms, sharding="fsdp2")))
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
        names = [f"adamw{split16}", f"adamw+bf16{split16}", f"adamw8bit{split8}"]
        names += [f"adamw4bit{split8}", f"lion8bit{split8}"]
        if task == "finetune":
            names.insert(3, f"rmsprop8bit{split8}")
            why.append(
                "fine-tuning: AdamW comes first, because most models were trained with it; 8-bit "
                "RMSprop, which has one moment less, only if 8-bit AdamW does not fit"
            )
        else:
            why.append(
                "transformers: AdamW, because adaptive steps cope with the heavy-tailed noise of "
                "their gradients (Zhang et al. 2020)"
            )
    if not model.convolutional:
        names += [f"pagedadamw8bit{split8}", f"pagedlion8bit{split8}"]
    why.append(
        "smaller formats come before paging, because they make a step faster, whereas paging makes "
        "it wait for the link; docs/training.md compares the losses of the formats"
    )
    if bf16:
        why.append(
            "bf16 weights store more bits in a companion (split16: exactly fp32; split8: 24 bits); "
            "without it, updates below 1/256 of a weight are lost"
        )
    return names, why


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
        refused = [f"{r.name} takes {show(r.predicted.peak)}" for r in before if r.predicted]
        advice.reasons = [first, *why]
        if refused:
            advice.reasons.insert(
                1, f"preferred, but larger than {show(room)}: {', '.join(refused)}"
            )
        return advice
    advice.reasons = [f"nothing fits in {show(room)} for this task", *why]
    change = cheapest_change(candidate(names[-1]), model, terms, room)
    if change is not None:
        advice.reasons.insert(1, f"{names[-1]} with {change}")
    later = TASKS[TASKS.index(task) + 1 :]
    for other in [t for t in later if t in ("lora", "qlora")]:
        smaller = recommend(whole, terms, limit, reserve, other, rank)
        if smaller.chosen is not None and not model.convolutional:
            advice.reasons.insert(1, f"--task {other} would fit: {smaller.reasons[0]}")
            break
    return advice
