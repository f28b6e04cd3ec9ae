"""``onepass.memory.track``: a timeline of the memory of any training code, by category."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .storage_tracking import Entry, Ledger, plain_tensors

CATEGORIES = ("weights", "gradients", "states", "activations", "temporary")
"""The categories in order of precedence: a storage is counted in the first category that it has
ever belonged to."""

_TITLES = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "states": "optimizer states",
    "activations": "saved for the backward pass",
    "temporary": "temporary",
}


@dataclass
class Timeline:
    """The bytes in use after every allocation and deallocation.

    Attributes:
        seconds: times of changes, in seconds since the start, ascending.
        bytes: category -> bytes from each of these times on.
        marks: (seconds, label) pairs for optimizer steps and for calls of :meth:`mark`.
    """

    seconds: list[float] = field(default_factory=list)
    bytes: dict[str, list[int]] = field(default_factory=lambda: {c: [] for c in CATEGORIES})
    marks: list[tuple[float, str]] = field(default_factory=list)
    _ledger: Ledger | None = None

    @property
    def total(self) -> list[int]:
        """Bytes of all categories together, from each time in ``seconds`` on."""
        return [sum(column) for column in zip(*self.bytes.values(), strict=True)]

    @property
    def peak(self) -> int:
        """The maximum number of bytes in use at one time."""
        return max(self.total, default=0)

    def at_peak(self) -> dict[str, int]:
        """Category -> bytes at the time of the peak."""
        total = self.total
        moment = total.index(max(total)) if total else 0
        return {c: values[moment] if values else 0 for c, values in self.bytes.items()}

    def mark(self, word: str) -> None:
        """Adds a label at the current time.

        Raises:
            RuntimeError: the tracking block has ended.
        """
        if self._ledger is None:
            raise RuntimeError("mark() must be called within track(): tracking has ended")
        self.marks.append((self._ledger.now, word))

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        return {"seconds": self.seconds, "bytes": self.bytes, "marks": self.marks}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file)

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draws a stacked plot; the suffix of ``path`` selects the format, such as PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import draw_timeline

        draw_timeline(path, self.seconds, self.bytes, self.marks, _TITLES, title)

    def _fill(self, entries: Iterable[Entry]) -> None:
        changes: list[tuple[float, str, int]] = []
        for entry in entries:
            category = next((c for c in CATEGORIES if c in entry.kinds), "temporary")
            changes.append((entry.born, category, entry.nbytes))
            if entry.died is not None:
                changes.append((entry.died, category, -entry.nbytes))
        now = dict.fromkeys(CATEGORIES, 0)
        for moment, category, nbytes in sorted(changes, key=lambda change: change[0]):
            now[category] += nbytes
            if self.seconds and self.seconds[-1] == moment:
                for c, value in now.items():
                    self.bytes[c][-1] = value
                continue
            self.seconds.append(moment)
            for c, value in now.items():
                self.bytes[c].append(value)


@contextmanager
def track(
    model: torch.nn.Module | Iterable[torch.Tensor],
    *optimizers: torch.optim.Optimizer,
) -> Iterator[Timeline]:
    """Tracks every tensor that the code in the block creates, until the tensor is freed.

    ::

        with onepass.memory.track(model, optimizer) as timeline:
            for batch in batches:
                model(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        timeline.plot("memory.png")

    Weights are the tensors of the model, gradients are the tensors in ``.grad``, states are the
    tensors in ``optimizer.state`` after a step, and activations are the tensors that autograd saves
    for the backward pass. All other tensors are temporary. Each storage on any device is counted
    once. Memory that a kernel allocates and frees within one operation is not counted, and neither
    are tensors created by threads other than the current thread and autograd's threads.

    Tracking costs some microseconds per operation, keeps no tensor alive and changes no result.

    Args:
        model: a module, or its parameters.
        optimizers: the optimizers of these parameters.

    Yields:
        The timeline. It is filled when the block ends, also if the block raises an exception.
    """
    timeline, ledger = Timeline(), Ledger()
    timeline._ledger = ledger
    if isinstance(model, torch.nn.Module):
        weights = [*model.parameters(), *model.buffers()]
    else:
        weights = list(model)
    handles = _follow(timeline, ledger, weights, optimizers)

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        ledger.enter(tensor, "activations")
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor), ledger:
            yield timeline
    finally:
        for handle in handles:
            handle.remove()
        timeline._ledger = None
        timeline._fill(ledger.entries)


def _follow(
    timeline: Timeline,
    ledger: Ledger,
    weights: Iterable[torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> list[Any]:
    """Records existing weights, gradients and states, and registers hooks that record later ones.

    Returns:
        The handles of the hooks, which the caller must remove.
    """
    handles: list[Any] = []

    def states(optimizer: Any, *_: Any) -> None:
        timeline.marks.append((ledger.now, "step"))
        for tensor in plain_tensors([dict(s) for s in optimizer.state.values()]):
            ledger.enter(tensor, "states")

    def gradient(param: torch.Tensor) -> None:
        if param.grad is not None:
            ledger.enter(param.grad, "gradients")

    for tensor in weights:
        ledger.enter(tensor, "weights")
        if tensor.grad is not None:
            ledger.enter(tensor.grad, "gradients")
        if tensor.requires_grad and tensor.is_leaf:
            register: Any = tensor.register_post_accumulate_grad_hook
            handles.append(register(gradient))
    for optimizer in optimizers:
        for tensor in plain_tensors([dict(s) for s in optimizer.state.values()]):
            ledger.enter(tensor, "states")
        handles.append(optimizer.register_step_post_hook(states))
    return handles
