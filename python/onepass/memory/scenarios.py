"""A model, an optimizer and the terms of a run -> a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..optim import Optimizer
from ..optim.registry import classes
from ..suggestions import did_you_mean
from . import shards
from .measure import measure
from .models import Model, Shape, load
from .models.shapes import EMBEDDING, NORM
from .peers import PEERS, Peer, categorise
from .predict import block_of, predict, storage_bytes
from .report import Bytes, MemoryReport
from .simulate import CannotSimulateError, simulate
from .variants import Variant, groups_of, parse


@dataclass(frozen=True)
class Terms:
    """What a run has in common for every optimizer.

    Attributes:
        dtype: of the weights.
        grad_dtype: of the gradients, None for the weights' own.
        careful: norms in fp32, and fp32 states for embeddings and norms: see
            onepass.cast_model and onepass.parameter_groups.
        shards, sharding: on how many GPUs, and how they divide it: "fsdp2" or "zero1".
        device: type of the device whose allocator and defaults count.
    """

    dtype: torch.dtype = torch.bfloat16
    grad_dtype: torch.dtype | None = None
    careful: bool = False
    shards: int = 1
    sharding: str = "fsdp2"
    device: str = "cpu"


@dataclass(frozen=True)
class Candidate:
    """An optimizer to be looked at: ours, a peer's, or a user's own factory."""

    name: str
    variant: Variant | None = None
    peer: Peer | None = None
    factory: Callable[..., Any] | None = field(default=None, hash=False)

    def maker(self, kinds: Sequence[str], terms: Terms) -> Callable[[list[Any]], Any]:
        """Parameters of these kinds -> the optimizer over those that are trained."""

        def make(params: list[torch.nn.Parameter]) -> Any:
            if self.variant is not None:
                return self.variant.make(groups_of(params, kinds, terms.careful))
            if self.peer is not None:
                return self.peer.optimizer(params)
            assert self.factory is not None
            return self.factory([p for p in params if p.requires_grad])

        return make

    def unavailable(self, device: str) -> str:
        """Why it cannot run on a device here; empty when it can."""
        return self.peer.unavailable(device) if self.peer is not None else ""


def candidate(name: str) -> Candidate:
    """The optimizer that a word of the command line means.

    Raises:
        ValueError: it means none; says what is accepted.
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
        f"no optimizer {name!r}{meant} It takes {', '.join(ours)} with "
        "options such as adamw+mx8+split8, a peer of --list-optimizers, or module:factory"
    )


def parameters(shapes: Sequence[Shape], terms: Terms) -> list[torch.nn.Parameter]:
    """Parameters of these shapes on the meta device, without memory."""
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
    """What each rank has the states of: parameters of one treatment are one group."""
    groups: dict[str, list[Shape]] = {}
    for shape in shapes:
        if shape.trained:
            kind = shape.kind if terms.careful and shape.kind in (EMBEDDING, NORM) else "matrix"
            groups.setdefault(kind, []).append(shape)
    return shards.dealt(groups.values(), terms.shards)


def predicted(choice: Candidate, model: Model, terms: Terms) -> Bytes:
    """The bytes on one GPU.

    Raises:
        CannotSimulateError: nothing predicts this optimizer here.
        ValueError: it refuses these parameters.
    """
    shapes: Sequence[Shape] = model.shapes
    if terms.shards > 1 and terms.sharding == "zero1":
        params = parameters(shapes, terms)
        # Whole weights and gradients; the states are of the rank's parameters alone.
        trained = [p for p in params if p.requires_grad]
        weights = storage_bytes(params)
        gradients = sum(p.numel() * (terms.grad_dtype or p.dtype).itemsize for p in trained)
        ranks = [_of_shapes(choice, rank, terms) for rank in _dealt(shapes, terms)]
        fullest = max(ranks, key=lambda found: found.states, default=Bytes())
        return replace(fullest, weights=weights, gradients=gradients)
    if terms.shards > 1:
        shapes = shards.sharded(shapes, terms.shards)
    return _of_shapes(choice, shapes, terms)


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
    """By the library's tables for one of ours, else by a simulated step."""
    optimizer = make(params) if all(p.is_meta for p in params) else None
    if isinstance(optimizer, Optimizer):
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        frozen = [p for p in params if id(p) not in held]
        block = block_of(torch.device(device))
        found = predict(optimizer, grad_dtype, block)
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
    """What one optimizer takes of one model; measured as well if asked and possible."""
    found = MemoryReport(choice.name, model.numel, terms.device, ours=choice.variant is not None)
    try:
        found.predicted = predicted(choice, model, terms)
    except CannotSimulateError as error:
        found.problem = f"not predicted: {error}"
    if choice.peer is not None and choice.peer.unseen and found.predicted is not None:
        found.notes.append(choice.peer.unseen)
    why = choice.unavailable(terms.device)
    if why:
        missing = " (predicted only)" if found.predicted is not None else ""
        found.problem = f"{why}{missing}"
    elif measured:
        params = parameters(model.shapes, terms)
        make = choice.maker([s.kind for s in model.shapes], terms)
        try:
            found.measured, found.process_peak = measure(
                make, params, terms.grad_dtype, terms.device, categorise, snapshot, tick
            )
        except Exception as error:
            if choice.variant is not None:
                raise
            # A peer, or a user's own, may fail in any way; the others are still measured.
            first = (str(error).strip().splitlines() or [""])[0]
            found.problem = f"does not run here: {type(error).__name__}: {first}"
    return found
