"""Memory reports for a model, an optimizer and the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..optim import Optimizer
from ..optim.registry import classes
from ..suggestions import did_you_mean
from . import shards, training_peak
from .activations import Sample, with_activations
from .measure import measure
from .models import Model, Shape, load
from .models.shapes import EMBEDDING, NORM
from .peers import PEERS, Peer, categorise
from .predict import block_of, predict, storage_bytes
from .report import Bytes, MemoryReport
from .shards import ONE_GPU, Mesh
from .simulate import CannotSimulateError, simulate
from .variants import Variant, groups_of, parse


@dataclass(frozen=True)
class Terms:
    """The settings of a run that are the same for every optimizer.

    Attributes:
        dtype: the dtype of the weights.
        grad_dtype: the dtype of the gradients; None for the dtype of the weights.
        careful: whether norms are in fp32, and the states of embeddings and norms too; see
            onepass.cast_model and onepass.parameter_groups.
        mesh: the GPUs and how the model is divided among them.
        sample: what a GPU computes in a step; None if activations are not counted.
        device: the device type, which determines allocation granularity and optimizer defaults.
    """

    dtype: torch.dtype = torch.bfloat16
    grad_dtype: torch.dtype | None = None
    careful: bool = False
    mesh: Mesh = ONE_GPU
    device: str = "cpu"
    sample: Sample | None = None


@dataclass(frozen=True)
class Candidate:
    """An optimizer to report on.

    Attributes:
        name: the name in the report.
        variant: a onepass optimizer with its options, or None.
        peer: an optimizer of another library, or None.
        factory: a user's function from parameters to an optimizer, or None.
    """

    name: str
    variant: Variant | None = None
    peer: Peer | None = None
    factory: Callable[..., Any] | None = field(default=None, hash=False)

    def maker(self, kinds: Sequence[str], terms: Terms) -> Callable[[list[Any]], Any]:
        """Returns a function that makes the optimizer over the trained ones of its parameters."""

        def make(params: list[torch.nn.Parameter]) -> Any:
            if self.variant is not None:
                matrices = self.variant.made.needs_matrices
                return self.variant.make(groups_of(params, kinds, terms.careful, matrices))
            if self.peer is not None:
                return self.peer.optimizer(params)
            assert self.factory is not None
            try:
                return self.factory([p for p in params if p.requires_grad])
            except Exception as error:  # the user's code can raise anything
                first = (str(error).splitlines() or [""])[0]
                raise CannotSimulateError(
                    f"{self.name} raised {type(error).__name__}: {first}"
                ) from error

        return make

    def unavailable(self, device: str) -> str:
        """The reason why the optimizer cannot run on a device here; empty if it can."""
        return self.peer.unavailable(device) if self.peer is not None else ""


def candidate(name: str) -> Candidate:
    """The optimizer with a name from the command line.

    Raises:
        ValueError: the name is unknown; the message lists the accepted names.
    """
    variant = parse(name)
    if variant is not None:
        return Candidate(variant.name, variant=variant)
    if name.lower() in PEERS:
        return Candidate(name.lower(), peer=PEERS[name.lower()])
    if ":" in name:
        return Candidate(name, factory=load(name))
    ours = classes()
    meant = did_you_mean(name, [*ours, *PEERS]) or "."
    raise ValueError(
        f"no optimizer {name!r}{meant} An optimizer must be {', '.join(ours)}, with options as in "
        "adamw+mx8+split8, a peer of --list-optimizers, or module:factory"
    )


def parameters(shapes: Sequence[Shape], terms: Terms) -> list[torch.nn.Parameter]:
    """Makes parameters of these shapes on the meta device."""
    found = []
    for shape in shapes:
        wide = terms.careful and shape.kind == NORM
        size, dtype = shape.shape, torch.float32 if wide else terms.dtype
        if shape.bits is not None:
            size, dtype = (int(-(-shape.numel * shape.bits // 8)),), torch.uint8
        value = torch.empty(size, dtype=dtype, device="meta")
        found.append(torch.nn.Parameter(value, requires_grad=shape.trained))
    return found


def _dealt(shapes: Sequence[Shape], terms: Terms) -> list[list[Shape]]:
    """The shapes whose states each rank holds; parameters with equal options form one group."""
    groups: dict[str, list[Shape]] = {}
    for shape in shapes:
        if shape.trained:
            kind = shape.kind if terms.careful and shape.kind in (EMBEDDING, NORM) else "matrix"
            groups.setdefault(kind, []).append(shape)
    return shards.dealt(groups.values(), terms.mesh.fsdp)


def predicted(choice: Candidate, model: Model, terms: Terms) -> Bytes:
    """Predicts the bytes on one GPU.

    Raises:
        CannotSimulateError: the bytes of this optimizer cannot be predicted here.
        ValueError: the optimizer does not accept these parameters.
    """
    matrices = choice.variant is not None and choice.variant.made.needs_matrices
    if matrices and terms.mesh.fsdp * terms.mesh.tp > 1:
        raise CannotSimulateError("the exchange of Muon's matrices between ranks is not predicted")
    whole, part = shards.local(model, terms.mesh)
    params = parameters(whole, terms)
    if terms.mesh.stage == 1:
        # Weights and gradients are not sharded; a rank holds only the states of its parameters.
        ranks = [_of_shapes(choice, rank, terms) for rank in _dealt(whole, terms)]
        found = max(ranks, key=lambda found: found.states, default=Bytes())
        trained = [p for p in params if p.requires_grad]
        gradients = sum(p.numel() * (terms.grad_dtype or p.dtype).itemsize for p in trained)
        found = replace(found, weights=storage_bytes(params), gradients=gradients)
    else:
        found = _of_shapes(choice, part, terms)
    if terms.mesh.tp > 1 and terms.mesh.fsdp == 1:
        extra = shards.undivided_gradients(model, terms.mesh.tp)
        size = (terms.grad_dtype or terms.dtype).itemsize
        found = replace(found, gradients=found.gradients + extra * size)
    found = replace(found, buffers=model.buffers)
    if terms.mesh.fsdp == 1 and terms.sample is None:
        return found
    counts = shards.parts(model, terms.mesh, whole)
    plan = training_peak.schedule(whole, params, counts, terms.grad_dtype, terms.mesh.stage)
    if terms.sample is not None:
        size = terms.dtype.itemsize
        plan = with_activations(plan, model, terms.sample, size, terms.mesh.tp)
    return at_peak(found, plan)


def at_peak(found: Bytes, plan: training_peak.Schedule) -> Bytes:
    """Adds what forward and backward hold, or keeps the temporary bytes of the step if larger."""
    more = max(0, plan.peak() - found.gradients)
    bare = plan.without_activations().peak()
    gathered = min(more, max(0, bare - found.gradients))
    if more <= found.temporary:
        return found
    return replace(found, gathered=gathered, activations=more - gathered, temporary=0)


def _of_shapes(choice: Candidate, shapes: Sequence[Shape], terms: Terms) -> Bytes:
    params = parameters(shapes, terms)
    if choice.peer is not None:
        return choice.peer.predict(params, terms.grad_dtype, terms.device)
    make = choice.maker([s.kind for s in shapes], terms)
    return predicted_of(make, params, terms.grad_dtype, terms.device)


def predicted_of(
    make: Callable[[list[Any]], Any],
    params: list[torch.nn.Parameter],
    grad_dtype: torch.dtype | None,
    device: str,
) -> Bytes:
    """Predicts bytes from the library's tables for onepass optimizers, else by a simulated step."""
    optimizer = make(params) if all(p.is_meta for p in params) else None
    if isinstance(optimizer, Optimizer):
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        frozen = [p for p in params if id(p) not in held]
        block = block_of(torch.device(device))
        found = predict(optimizer, grad_dtype, block, torch.device(device))
        return found + Bytes(weights=storage_bytes(frozen, block))
    return simulate(make, params, grad_dtype, device, categorise)


def report(
    choice: Candidate,
    model: Model,
    terms: Terms,
    measured: bool = False,
    snapshot: Path | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> MemoryReport:
    """The memory report of one optimizer over one model.

    Args:
        choice: the optimizer.
        model: the model.
        terms: the settings of the run.
        measured: also take real steps, if the optimizer can run here.
        snapshot: see :func:`onepass.memory.measure.measure`.
        tick: called with a short text before each step.
    """
    found = MemoryReport(choice.name, model.numel, terms.device, ours=choice.variant is not None)
    try:
        found.predicted = predicted(choice, model, terms)
    except CannotSimulateError as error:
        found.problem = f"not predicted: {error}"
    if choice.peer is not None and choice.peer.unseen and found.predicted is not None:
        found.notes.append(choice.peer.unseen)
    why = choice.unavailable(terms.device)
    found.by_formula = choice.peer is not None and choice.peer.by_formula
    if choice.peer is not None and found.by_formula:
        found.problem = f"{why}; predicted by a formula from the source of {choice.peer.source}"
    elif why:
        missing = " (predicted only)" if found.predicted is not None else ""
        found.problem = f"{why}{missing}"
    elif measured:
        params = parameters(model.shapes, terms)
        make = choice.maker([s.kind for s in model.shapes], terms)
        try:
            made, found.process_peak = measure(
                make, params, terms.grad_dtype, terms.device, categorise, snapshot, tick
            )
            found.measured = replace(made, buffers=model.buffers)
        except Exception as error:
            if choice.variant is not None:
                raise
            # Third-party code can raise anything; the remaining optimizers are still measured.
            first = (str(error).strip().splitlines() or [""])[0]
            found.problem = f"does not run here: {type(error).__name__}: {first}"
    return found
