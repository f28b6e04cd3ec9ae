"""The training loop: equal weights, batches and schedule for every optimizer, and timing."""

from __future__ import annotations

import math
import statistics
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from onepass.memory.simulate import state_bytes as bytes_by_category
from onepass_tools.demo.data import Batches
from onepass_tools.demo.model import GPT, Shape, count_parameters
from onepass_tools.demo.recipes import Recipe

MAX_GRAD_NORM = 1.0
VALIDATIONS = 6  # validations per run; the last one follows the last step


@dataclass(frozen=True)
class Task:
    """The model, device, initial weights and batches, which are the same for every optimizer."""

    shape: Shape
    device: torch.device
    weights: dict[str, Tensor]
    train: Batches
    validation: Batches

    def model(self) -> GPT:
        """Return a model with the initial weights, on the device."""
        model = GPT(self.shape)
        model.load_state_dict(self.weights)
        return model.to(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the forward pass: bf16 on a GPU, fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")


@dataclass
class Run:
    """The result of one run: losses in nats per byte, optimizer ms per step, total seconds."""

    key: str
    label: str
    lr: float
    weight_decay: float
    train_loss: list[float]
    validation_steps: list[int]
    validation_loss: list[float]
    optimizer_ms: float
    state_bytes_per_parameter: float
    seconds: float


@dataclass(frozen=True)
class Replay:
    """Differences of onepass.AdamW and torch.optim.AdamW with equal weights and gradients."""

    steps: int
    lr: float
    one_step_max_difference: float
    one_step_in_lr: float
    max_difference: float
    max_update: float
    relative_difference: float


@dataclass
class Stopwatch:
    """Times a part of each step without synchronization between host and GPU."""

    device: torch.device
    _host: list[float] = field(default_factory=list)
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._events.append((_event(), _event()))
            self._events[-1][0].record()
        else:
            self._host.append(time.perf_counter())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._host[-1] = time.perf_counter() - self._host[-1]

    def median_ms(self) -> float:
        """Return the median in ms, without the first step, which also allocates the states."""
        synchronize(self.device)
        times = [start.elapsed_time(end) for start, end in self._events]
        times += [1e3 * seconds for seconds in self._host]
        return float(statistics.median(times[1:] or times))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def synchronize(device: torch.device) -> None:
    """Wait for the kernels of a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return a linear warm-up over a tenth of the run, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the storages in `optimizer.state`, with each storage counted once."""
    return sum(bytes_by_category(optimizer).values())


def backward(task: Task, model: nn.Module, index: int) -> Tensor:
    """Compute the clipped gradients of batch `index` in the model, and return the loss."""
    with task.autocast():
        loss: Tensor = model(*task.train[index])
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    return loss.detach()


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    """Return the mean loss over the fixed validation batches."""
    with task.autocast():
        losses = [model(*task.validation[index]) for index in range(len(task.validation))]
    return float(torch.stack(losses).double().mean())


def train(task: Task, recipe: Recipe, steps: int, quiet: bool) -> Run:
    """Train from the initial weights for `steps` steps with one optimizer."""
    from tqdm import tqdm  # bench.pretrain uses this module without tqdm

    began = time.perf_counter()
    model = task.model()
    optimizer = recipe.build(model)
    scheduler = schedule(optimizer, steps)
    stopwatch = Stopwatch(task.device)
    losses: list[Tensor] = []
    validation_steps: list[int] = []
    validation_loss: list[float] = []
    due = {steps * (index + 1) // VALIDATIONS for index in range(VALIDATIONS)} - {0}

    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=steps, desc=f"{recipe.label:<26}", unit="step", disable=hidden) as bar:
        for step in range(1, steps + 1):
            losses.append(backward(task, model, step - 1))
            with stopwatch:
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step in due:
                validation_steps.append(step)
                validation_loss.append(validate(task, model))
                bar.set_postfix_str(f"validation loss {validation_loss[-1]:.3f}", refresh=False)
            bar.update()

    return Run(
        key=recipe.key,
        label=recipe.label,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        train_loss=torch.stack(losses).tolist(),
        validation_steps=validation_steps,
        validation_loss=validation_loss,
        optimizer_ms=stopwatch.median_ms(),
        state_bytes_per_parameter=state_bytes(optimizer) / count_parameters(model),
        seconds=time.perf_counter() - began,
    )


def seconds_per_step(task: Task, recipe: Recipe) -> tuple[float, float]:
    """Return the seconds of a training step and of a validation, measured on a temporary model."""
    model = task.model()
    optimizer = recipe.build(model)
    times: list[float] = []
    for index in range(len(task.train)):
        synchronize(task.device)
        began = time.perf_counter()
        backward(task, model, index)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(task.device)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    validate(task, model)
    # The lower quartile excludes the first steps, which start threads and fill caches, and steps
    # slowed down by other processes.
    return sorted(times)[len(times) // 4], time.perf_counter() - began


def replay(task: Task, reference: Recipe, candidate: Recipe, steps: int) -> Replay:
    """Apply the gradients of a `reference` run with both optimizers, and compare the weights.

    Both optimizers get bitwise equal gradients, because separate training runs amplify differences.
    """
    model, other = task.model(), task.model()
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer, other_optimizer = reference.build(model), candidate.build(other)
    first = largest = 0.0
    for step in range(steps):
        backward(task, model, step)
        for parameter, copy in zip(model.parameters(), other.parameters(), strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.clone()
        optimizer.step()
        other_optimizer.step()
        optimizer.zero_grad()
        largest = _largest_difference(list(model.parameters()), list(other.parameters()))
        if step == 0:
            first = largest
    update = _largest_difference(list(model.parameters()), initial)
    lr = candidate.lr
    return Replay(steps, lr, first, first / lr, largest, update, largest / update)


def _largest_difference(
    left: list[nn.Parameter], right: list[Tensor] | list[nn.Parameter]
) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


def loss_deviation(left: Run, right: Run, steps: int | None = None) -> float:
    """Return the largest difference of the training losses of two runs in the first `steps`."""
    pairs = zip(left.train_loss[:steps], right.train_loss[:steps], strict=True)
    return max(abs(a - b) for a, b in pairs)


def as_dict(result: Run | Replay) -> dict[str, object]:
    """Return a result as plain values for JSON."""
    return asdict(result)
