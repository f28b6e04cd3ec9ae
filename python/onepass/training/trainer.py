"""The training loop: `train_step` and `fit`, with set-up, saving and loading."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from ..optim import AdamWScheduleFree, Muon, Optimizer
from ..optim.grad_scaler import GradScaler
from ..optim.mixed_precision import EMBEDDINGS, NORMS
from ..rules.option_checks import check_flag
from .checkpoint import (
    VERSION,
    check_checkpoint,
    loader_generators,
    read_checkpoint,
    rng_state,
    save_atomically,
    set_rng_state,
)
from .groups import decay_groups, split_for_muon
from .optimizers import make_optimizer, optimizer_class
from .progress import progress_bar
from .schedules import SCHEDULE_OPTIONS
from .schedules import schedule as make_schedule
from .validation import (
    check_callable,
    check_count,
    check_file,
    check_formats,
    check_loader,
    check_model,
    check_name,
    check_options,
)

GUARDS = ("raise", "skip", "off")


class Trainer:
    """Trains a model with a onepass optimizer.

    ::

        trainer = Trainer(model, "adamw", lr=1e-3, loss=nn.functional.cross_entropy)
        trainer.fit(loader, epochs=3, checkpoint="run.pt", save_every=100)

    Attributes:
        model, optimizer, scheduler: the objects in use; they may be changed between steps.
        losses: one float per :meth:`train_step`; the entry of a skipped batch may be NaN or inf.
        epoch: the number of epochs that :meth:`fit` has finished.

    Args:
        model: the model, already on its device. Data is moved to the device of its parameters.
        optimizer_type: a name in :data:`onepass.training.OPTIMIZERS`, or a onepass class. With
            Muon, AdamW steps the parameters that :func:`onepass.muon_groups` leaves to it, with the
            same learning rate.
        lr: the highest learning rate of the schedule.
        weight_decay: the weight decay, which is not applied to biases and norms; see
            :func:`decay_groups`.
        loss: a function ``loss(model(data), target)`` that returns a 0-dim mean over the batch.
        schedule: a name in :data:`onepass.training.SCHEDULES`.
        warmup_steps: the number of linear warm-up steps before the schedule.
        schedule_options: further keywords of :func:`onepass.training.schedule`, such as
            ``total_steps``, which ``"cosine"`` and ``"wsd"`` require.
        max_grad_norm: the global norm to which the step clips gradients; None disables clipping.
        accumulate: the number of parts into which a batch is split along its first dimension. The
            gradients of the parts are summed with weights proportional to their sizes. The result
            is the gradient of the whole batch, with less memory.
        amp: the autocast dtype: None, torch.bfloat16 or torch.float16. float16 uses a loss scale.
        nan_guard: the action if a loss or gradient is not finite: ``"raise"``, ``"skip"`` (skip the
            batch) or ``"off"``. With ``"raise"`` and ``"skip"``, no non-finite value reaches a
            weight or state. With amp float16, the loss scaler handles infinite gradients: the step
            is skipped and nothing is raised.
        options: keyword arguments of the optimizer, such as ``betas``, ``states="mx8"`` or
            ``weights="split8"``. With a format, embeddings and norms keep fp32 states, as in
            :func:`onepass.parameter_groups`. AdamW's betas are (0.9, 0.95) by default.

    Raises:
        ValueError: a name is unknown (the message lists the known names), an option is out of
            range, no parameter requires a gradient, or no parameter has a dtype that the format
            ``weights`` supports.
        TypeError: the optimizer does not have one of the options, or an argument has the wrong
            type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_type: str | type[Optimizer] = "adamw",
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.01,
        loss: Callable[[Any, Any], Tensor] = functional.mse_loss,
        schedule: str = "warm_restarts",
        warmup_steps: int = 10,
        schedule_options: dict[str, Any] | None = None,
        max_grad_norm: float | None = 1.0,
        accumulate: int = 1,
        amp: torch.dtype | None = None,
        nan_guard: str = "raise",
        **options: Any,
    ) -> None:
        check_model(model)
        kind = optimizer_class(optimizer_type)
        check_callable("loss", loss, "a function loss(output, target)")
        check_options("schedule_options", schedule_options, SCHEDULE_OPTIONS)
        check_name("nan_guard", nan_guard, GUARDS)
        check_count("accumulate", accumulate, 1)
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"amp must be None, torch.bfloat16 or torch.float16; got {amp!r}")
        check_formats(model, options)
        packed = (
            any(options.get(key) for key in ("states", "weights")) or kind.default_states != "fp32"
        )
        groups = decay_groups(
            model, weight_decay, fp32_states=(*EMBEDDINGS, *NORMS) if packed else None
        )
        options = {"skip_nonfinite": nan_guard != "off", **options}
        self.model, self.loss = model, loss
        self.device = groups[0]["params"][0].device
        if issubclass(kind, Muon):
            groups = split_for_muon(model, groups)
        self.optimizer = make_optimizer(
            optimizer_type, groups, lr, max_grad_norm=max_grad_norm, **options
        )
        self.scheduler = make_schedule(
            self.optimizer, schedule, warmup_steps=warmup_steps, **(schedule_options or {})
        )
        self.accumulate, self.amp, self.nan_guard = accumulate, amp, nan_guard
        self.scaler = GradScaler(self.device.type, enabled=amp == torch.float16)
        self.losses: list[float] = []
        self.epoch = 0
        # The position of fit(): its first epoch, the number of finished batches of the current
        # epoch, and the RNG states at the start of the current epoch. None outside of fit().
        self._position: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    # --- the loop ---

    def train_step(self, data: Any, target: Any) -> float:
        """Takes one step: forward, backward, clipped update, schedule.

        Returns:
            The loss before the update.

        Raises:
            FloatingPointError: a loss or gradient is not finite and ``nan_guard`` is ``"raise"``;
                weights and states are unchanged.
        """
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad()
        mean = 0.0
        for part, wanted, share in self._parts(self._move(data), self._move(target)):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                loss = self.loss(self.model(part), wanted)
            mean += share * loss.item()
            if self.nan_guard != "off" and not math.isfinite(mean):
                return self._refuse(mean, f"the loss is {mean}")
            self.scaler.scale(share * loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        norm = self.optimizer.grad_norm
        asked = self.nan_guard == "raise" and not self.scaler.is_enabled()
        if asked and norm is not None and not math.isfinite(norm):
            return self._refuse(mean, f"the gradients' norm is {norm:g}, the loss {mean:g}")
        self.losses.append(mean)
        self.scheduler.step()
        return mean

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Trains for ``epochs`` passes over ``loader``, and returns :attr:`losses`.

        After :meth:`load` of a checkpoint that fit() wrote, this call resumes the saved fit(): it
        continues with the batch after the last saved one, and ``epochs`` counts from the first
        epoch of the saved fit(). A script that loads an existing checkpoint can therefore be killed
        and restarted at any time, and ends with the same bits as an uninterrupted run.

        To reproduce the order of the data, a resumed epoch restores the RNG states of its start,
        and draws and discards the finished batches. This works for a DataLoader and any iterable
        that uses the global generators of Python, NumPy and torch. ``loader.sampler.set_epoch`` is
        called if it exists.

        Args:
            loader: an iterable of pairs (data, target).
            epochs: the number of passes over ``loader``.
            checkpoint: the file to save to, in an existing folder, after every epoch and every
                ``save_every`` steps; None to save nothing.
            save_every: the number of steps between checkpoints; requires ``checkpoint``.
            progress: show a bar on stderr if stderr is a terminal and tqdm is installed.

        Raises:
            ValueError: an argument is out of range, ``save_every`` is given without ``checkpoint``,
                or the loader yields no batch or fewer batches than the checkpoint had finished.
            TypeError: an argument has the wrong type.
            FileNotFoundError: the folder of ``checkpoint`` does not exist.
            FloatingPointError: see :meth:`train_step`; the last checkpoint is not overwritten.
        """
        check_loader(loader)
        check_count("epochs", epochs, 0)
        _check_saving(checkpoint, save_every)
        check_flag("progress", progress)
        place = self._loaded or {"first": self.epoch, "batch": 0, "random": _random(loader)}
        self._loaded, self._position = None, place
        last = place["first"] + epochs
        with progress_bar(loader, last - self.epoch, place["batch"], progress) as bar:
            while self.epoch < last:
                for data, target in self._rest_of_epoch(loader, place):
                    loss = self.train_step(data, target)
                    place["batch"] += 1
                    bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                    bar.update()
                    if save_every and checkpoint is not None and len(self.losses) % save_every == 0:
                        self.save(checkpoint)
                self.epoch += 1
                place.update(batch=0, random=_random(loader))
                if checkpoint is not None:
                    self.save(checkpoint)
        self._position = None
        return self.losses

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any]) -> float:
        """The mean loss over ``loader`` in evaluation mode, with batches weighted by their sizes.

        A schedule-free optimizer is in eval mode during the call, so its averages are evaluated.

        Raises:
            ValueError: the loader yields no batch.
            TypeError: the loader is not iterable.
        """
        check_loader(loader)
        training, total, count = self.model.training, 0.0, 0
        free = self.optimizer if isinstance(self.optimizer, AdamWScheduleFree) else None
        switched = free is not None and free.training
        self.model.eval()
        try:
            if free is not None and switched:
                free.eval()
            for data, target in loader:
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    loss = self.loss(self.model(self._move(data)), self._move(target))
                total += loss.item() * len(target)
                count += len(target)
        finally:
            self.model.train(training)
            if free is not None and switched:
                free.train()
        if not count:
            raise ValueError("loader must give at least one batch; it gave none")
        return total / count

    # --- its parts ---

    def _move(self, data: Any) -> Any:
        def move(x: Any) -> Any:
            return x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x

        return tree_map(move, data)

    def _parts(self, data: Any, target: Any) -> Iterator[tuple[Any, Any, float]]:
        """Yields (data, target, fraction of the samples) for each part of the batch."""
        if self.accumulate == 1:
            yield data, target, 1.0
            return
        for part, wanted in zip(
            data.chunk(self.accumulate), target.chunk(self.accumulate), strict=True
        ):
            yield part, wanted, len(part) / len(data)

    def _refuse(self, loss: float, what: str) -> float:
        self.optimizer.zero_grad()
        if self.nan_guard == "raise":
            raise FloatingPointError(
                f"step {len(self.losses)}: {what}; the weights are those from before this step. "
                "A lower lr, a longer warm-up or clipping may help; nan_guard='skip' skips such "
                "batches"
            )
        self.losses.append(loss)
        return loss

    def _rest_of_epoch(self, loader: Any, place: dict[str, Any]) -> Iterator[Any]:
        """Yields the unfinished batches of this epoch."""
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        done, now = place["batch"], rng_state()
        set_rng_state(place["random"])
        own = loader_generators(loader)
        for generator, state in zip(own, place["random"]["loader"], strict=True):
            generator.set_state(state)
        batches = iter(loader)
        dropped = sum(1 for _ in itertools.islice(batches, done))
        if dropped < done:
            raise ValueError(
                "loader must give all batches of the interrupted epoch: it gave "
                f"{dropped} batches; the checkpoint had done {done} of this epoch"
            )
        if done:
            set_rng_state(now)
        yield from batches
        if not place["batch"]:
            raise ValueError(
                "loader must give at least one batch; it gave none"
                + (": an iterator can be used once, pass an iterable" if self.losses else "")
            )

    # --- checkpoints ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves model, optimizer, schedule, loss scale, losses and RNG states to ``path``.

        A temporary file is written and then renamed, so ``path`` always contains a complete file.

        Raises:
            TypeError, ValueError: ``path`` is not the path of a file.
            FileNotFoundError: the folder of ``path`` does not exist.
        """
        check_file("path", path)
        content = {
            "version": VERSION,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "epoch": self.epoch,
            "random": rng_state(),
            "position": self._position,
        }
        save_atomically(content, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restores the state saved by :meth:`save`, from this process or another.

        Raises:
            ValueError: ``path`` was not written by :meth:`save`; or its version, model, type of
                optimizer or schedule differs; or it lacks the loss scale that this run uses.
                Nothing is changed.
            TypeError: ``path`` is not a path.
            FileNotFoundError: the file does not exist.
        """
        check_file("path", path)
        saved = read_checkpoint(path, self.device)
        check_checkpoint(self.model, self.scheduler, self.scaler, saved, path)
        before = {key: deepcopy(value) for key, value in self.model.state_dict().items()}
        # Load the weights first: the companions in the optimizer state depend on them.
        self.model.load_state_dict(saved["model"])
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError:
            self.model.load_state_dict(before)
            raise
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.losses, self.epoch = saved["losses"], saved["epoch"]
        self._loaded = saved["position"]
        set_rng_state(_on_host(saved["random"]))
        if self._loaded is not None:
            self._loaded["random"] = _on_host(self._loaded["random"])


def _random(loader: Any) -> dict[str, Any]:
    return {**rng_state(), "loader": [g.get_state() for g in loader_generators(loader)]}


def _on_host(state: Any) -> Any:
    return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, state)


def _check_saving(checkpoint: str | os.PathLike[str] | None, save_every: int | None) -> None:
    """Checks the ``checkpoint`` and ``save_every`` arguments of :meth:`Trainer.fit`."""
    if checkpoint is not None:
        check_file("checkpoint", checkpoint)
    if save_every is not None:
        check_count("save_every", save_every, 1)
        if checkpoint is None:
            raise ValueError(
                f"save_every={save_every} needs checkpoint, the file to save to; got None"
            )
