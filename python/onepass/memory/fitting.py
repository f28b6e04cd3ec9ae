"""``onepass.memory.fits``: whether a training run fits into the memory of a GPU."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..engine.state_tracking import OptimizerState
from ..optim import Optimizer
from .activations import Sample
from .gpus import capacity
from .models import Model, find, from_transformers, of_module
from .report import CATEGORIES, TITLES, Bytes
from .scenarios import Candidate, Terms, candidate, predicted
from .shards import Mesh, parse_mesh
from .sizes import show


@dataclass(frozen=True)
class Fit:
    """Whether a training run fits, and why.

    Attributes:
        fits: whether the peak is at most the memory of the GPU.
        peak: predicted bytes at the peak of a training step on the GPU that holds the most.
        capacity: bytes of memory of the GPU.
        breakdown: category -> bytes; the sum is the peak. ``host`` is not included in it.
        host: bytes of paged states in host memory.
        title: the model, optimizer and mesh.
        counts_activations: whether the activations of a sample are part of the peak.
    """

    fits: bool
    peak: int
    capacity: int
    breakdown: dict[str, int]
    host: int
    title: str
    counts_activations: bool

    def explain(self) -> str:
        """The result as text: the parts in descending order, and what is not counted."""
        left = self.capacity - self.peak
        verdict = f"fits, {show(left)} left" if self.fits else f"does not fit: {show(-left)} over"
        lines = [f"{self.title}: {show(self.peak)} of {show(self.capacity)}; {verdict}"]
        for name, nbytes in sorted(self.breakdown.items(), key=lambda item: -item[1]):
            lines.append(f"  {TITLES[name]:<28} {show(nbytes):>9}")
        if self.host:
            lines.append(f"  {TITLES['host']:<28} {show(self.host):>9}")
        if not self.counts_activations:
            lines.append("  not counted: activations; give sample=(batch, sequence)")
        return "\n".join(lines)


def fits(
    model_or_config: str | Mapping[str, Any] | torch.nn.Module | Any,
    optimizer: str | type | torch.optim.Optimizer | Callable[[list[Any]], Any],
    *,
    device: str | int = "H100",
    mesh: str | Mapping[str, int] | Mesh | None = None,
    sample: Sample | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Fit:
    """Predicts whether a training run fits into the memory of a GPU; nothing is allocated.

    ::

        fit = onepass.memory.fits("llama-3-8b", "adamw8bit", device="H100", mesh="fsdp=8")
        print(fit.fits, fit.peak, fit.explain())

    Args:
        model_or_config: a name of ``onepass memory --list-models``, the path of a config.json or
            its folder, a configuration (a mapping or an object of transformers), or a module, also
            on the meta device.
        optimizer: a name as on the command line (``"adamw+mx8+split8"``), a class or a function of
            a list of parameters, or an optimizer with one parameter group, whose options are used.
        device: a GPU by name (``onepass.memory.gpus.GPUS``) or its memory, such as "24GB".
        mesh: the GPUs, such as "fsdp=8,tp=2" or {"fsdp": 8}; None for one GPU. See docs/memory.md.
        sample: the batch and sequence length per GPU, as a pair or a :class:`Sample`; activations
            are then counted.
        dtype: the dtype of the weights; None for that of a module, else bf16.

    Raises:
        ValueError: an argument is not valid; the message lists what is accepted.
        CannotSimulateError: the step of this optimizer cannot be predicted here.
    """
    limit, over = capacity(device), parse_mesh(mesh)
    model, own = _model(model_or_config)
    terms = Terms(dtype or own or torch.bfloat16, mesh=over, device="cuda")
    if sample is not None and not isinstance(sample, Sample):
        sample = Sample(*sample)
    choice = _choice(optimizer)
    found: Bytes = predicted(choice, model, replace(terms, sample=sample))
    parts = {name: n for name in CATEGORIES if (n := getattr(found, name))}
    where = f" on {over.ranks} GPUs ({over})" if over.ranks > 1 else ""
    return Fit(
        found.peak <= limit,
        found.peak,
        limit,
        parts,
        found.host,
        f"{model.name} with {choice.name}{where}",
        sample is not None,
    )


def _model(given: Any) -> tuple[Model, torch.dtype | None]:
    """The model, and the dtype of its largest parameter if it is a module."""
    if isinstance(given, str):
        return find(given), None
    if isinstance(given, torch.nn.Module):
        largest = max(given.parameters(), key=lambda p: p.numel(), default=None)
        if largest is None:
            raise ValueError("model_or_config must have parameters; got a module without any")
        found = of_module(given, type(given).__name__)
        if from_transformers.as_mapping(config := getattr(given, "config", None)):
            found = replace(found, config=from_transformers.sizes_of(config, given))
        return found, largest.dtype
    config = from_transformers.as_mapping(given)
    if not config.get("model_type"):
        raise ValueError(
            "model_or_config must be a name, the path of a config.json, a configuration with "
            f"model_type, or a module; got a {type(given).__name__}"
        )
    name = str(config["model_type"])
    return from_transformers.of_transformers(config, name, "model_or_config"), None


def _choice(given: Any) -> Candidate:
    """The candidate of a name, a class, an instance or a factory."""
    if isinstance(given, str):
        return candidate(given)
    if isinstance(given, torch.optim.Optimizer):
        if len(given.param_groups) != 1:
            raise ValueError(
                "an optimizer must have one parameter group to be used for another model; got "
                f"{len(given.param_groups)}: give its class or a function of a list of parameters"
            )
        return Candidate(type(given).__name__, factory=_like(given))
    if not callable(given):
        raise ValueError(
            "optimizer must be a name, an optimizer, its class or a function of a list of "
            f"parameters; got a {type(given).__name__}"
        )
    return Candidate(getattr(given, "__name__", type(given).__name__), factory=given)


def _like(optimizer: torch.optim.Optimizer) -> Callable[[list[Any]], Any]:
    """A function that makes an optimizer with the options of another one, without its states."""

    def make(params: list[Any]) -> Any:
        state: Any = OptimizerState() if isinstance(optimizer, Optimizer) else defaultdict(dict)
        memo: dict[int, Any] = {id(optimizer.state): state}
        memo[id(optimizer.param_groups[0]["params"])] = params
        return copy.deepcopy(optimizer, memo)

    return make
