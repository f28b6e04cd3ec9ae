"""``python -m bench.pretrain``: pretrains GPT-2 124 M once per optimizer configuration.

Every configuration starts from the same weights, sees the same batches in the same order, and
computes in bf16 under torch.autocast. The result is the validation loss over the run, tokens per
second, peak memory, and the optimizer's share of a training step.

Each finished run is one line in bench/results/pretrain.jsonl. Runs that already have a line are
skipped, so an interrupted benchmark continues where it stopped. ``--report`` writes
docs/pretrain.md and docs/pretrain.png from the lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from onepass.training import schedule
from onepass_tools.benchmark.devices import Device
from onepass_tools.demo.data import Batches, Corpus, load
from onepass_tools.demo.model import GPT, Shape, count_parameters
from onepass_tools.demo.train import MAX_GRAD_NORM, Task, backward, state_bytes, validate

from . import pretrain_report, results
from .options import device_of, keep, parser_of
from .pretrain_configs import BETAS, CONFIGS, EPS, LR, WEIGHT_DECAY, Config
from .results import Line
from .runs import run_key

KIND = "pretrain"
OUT = results.ROOT / "bench" / "results" / "pretrain.jsonl"
SECONDS = 120.0
FINAL_LR = 0.1  # of the peak, at the end of the cosine
VALIDATIONS = 12  # per run, evenly spaced; the last one follows the last step
UNTIMED = 10  # first steps, left out of the medians: they allocate states and compile kernels
PROBE = 20  # steps, at most, that measure the seconds per step; after 5 untimed ones


@dataclass(frozen=True)
class Size:
    """The amount of work in a run.

    Attributes:
        shape: width, depth, heads and context of the model.
        vocabulary: rows of the embedding. Tokens are bytes and use the first 256 rows; the other
            rows give the embedding the size that it has in the 124 M model.
        batch: windows of ``shape.context`` tokens per step.
        steps: training steps; None to derive the number from a time budget.
    """

    shape: Shape
    vocabulary: int
    batch: int
    steps: int | None
    validation_batches: int
    corpus_bytes: int


FULL = Size(Shape(1024, 768, 12, 12), 50257, 32, None, 16, 16_000_000)
QUICK = Size(Shape(32, 64, 2, 2), 256, 4, 8, 2, 400_000)


class GPT2(GPT):
    """The demo's GPT with an embedding of ``vocabulary`` rows, which is also the output layer."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__(shape)
        self.tokens = nn.Embedding(vocabulary, shape.width)
        nn.init.normal_(self.tokens.weight, std=0.02)


@dataclass(frozen=True)
class Bf16Task(Task):
    """The demo's task with this benchmark's model, in bf16 compute on every device."""

    vocabulary: int

    def model(self) -> GPT2:
        """Return a model with the initial fp32 weights, on the device."""
        model = GPT2(self.shape, self.vocabulary)
        model.load_state_dict(self.weights)
        return model.to(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision of the forward pass: bf16."""
        return torch.autocast(self.device.type, torch.bfloat16)


def task_of(size: Size, corpus: Corpus, device: Device, seed: int, steps: int) -> Bf16Task:
    """The initial weights and the batches of a seed; the corpus must be on the device already."""
    torch.manual_seed(seed)
    context = size.shape.context
    return Bf16Task(
        shape=size.shape,
        device=torch.device(device.type),
        weights=GPT2(size.shape, size.vocabulary).state_dict(),
        train=Batches(corpus.train, steps, size.batch, context, seed),
        # The same validation windows for every seed, so that seeds can be compared.
        validation=Batches(corpus.validation, size.validation_batches, size.batch, context, 0),
        vocabulary=size.vocabulary,
    )


def settings(size: Size, corpus: Corpus) -> Line:
    """Everything a result depends on except configuration, number of steps, seed and machine.

    The Python version is part of it because the text is Python's own library.
    """
    return {
        **{name: value for name, value in asdict(size).items() if name != "steps"},
        "text": f"Python {platform.python_version()}",
        "train_bytes": corpus.train.numel(),
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "final_lr": FINAL_LR,
        "max_grad_norm": MAX_GRAD_NORM,
        "validations": VALIDATIONS,
    }


class Clock:
    """Timestamps within training steps: events on the GPU's stream, or the host's clock.

    Events do not make the host wait for the GPU, so training runs as fast as without a clock.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._host: list[float] = []

    def mark(self) -> None:
        """Record the current time."""
        if self._device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._events[-1].record()
        else:
            self._host.append(time.perf_counter())

    def milliseconds(self, marks: int) -> list[list[float]]:
        """For each step, the milliseconds from its first mark to each of its other marks.

        Args:
            marks: number of marks per step.
        """
        self._device.synchronize()
        count = max(len(self._events), len(self._host))
        found = []
        for first in range(0, count, marks):
            others = range(first + 1, first + marks)
            if self._events:
                own = [self._events[first].elapsed_time(self._events[i]) for i in others]
            else:
                own = [1e3 * (self._host[i] - self._host[first]) for i in others]
            found.append(own)
        return found


def training_step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, index: int, clock: Clock
) -> torch.Tensor:
    """Train on batch ``index`` and return its loss.

    Makes four marks on the clock: at the start, before and after the optimizer's step, and at the
    end. Gradients are clipped by torch.nn.utils.clip_grad_norm_ for every optimizer, outside its
    step.
    """
    clock.mark()
    loss = backward(task, model, index)
    clock.mark()
    optimizer.step()
    clock.mark()
    optimizer.zero_grad()
    clock.mark()
    return loss


def free_memory(device: Device) -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    device.release()


def train(config: Config, task: Bf16Task, seed: int, device: Device) -> Line:
    """Train on all batches of the task; return the measured fields of the result line."""
    began = time.perf_counter()
    free_memory(device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    model = config.model(task)
    optimizer = config.optimizer(model, seed)
    steps = len(task.train)
    scheduler = schedule(
        optimizer, "cosine", warmup_steps=steps // 10, total_steps=steps, final=FINAL_LR
    )
    due = {steps * (i + 1) // VALIDATIONS for i in range(VALIDATIONS)} - {0}
    clock, losses, validations = Clock(device), [], []
    with results.Progress(steps) as progress:
        for step in range(1, steps + 1):
            losses.append(training_step(task, model, optimizer, step - 1, clock))
            scheduler.step()
            if step in due:
                validations.append((step, validate(task, model)))
            progress.tick(f"seed {seed} {config.name}", done=True)
    timed = clock.milliseconds(4)[min(UNTIMED, steps // 2) :]
    step_ms = statistics.median(end for _, _, end in timed)
    optimizer_ms = statistics.median(after - before for before, after, _ in timed)
    parameters = count_parameters(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = state_bytes(optimizer)
    return {
        "parameters": parameters,
        "validations": validations,
        "validation_loss": validations[-1][1],
        # Mean over the last tenth of the steps.
        "train_loss": float(torch.stack(losses[-max(1, steps // 10) :]).double().mean()),
        "tokens_per_second": round(1e3 * task.train[0][0].numel() / step_ms, 1),
        "step_ms": round(step_ms, 5),
        "optimizer_ms": round(optimizer_ms, 5),
        "optimizer_share": round(optimizer_ms / step_ms, 6),
        # Weight, its gradient of the same dtype, and everything the optimizer holds.
        "bytes_per_parameter": round((2 * weights + states) / parameters, 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        # Between steps, when there are neither gradients nor activations.
        "held_bytes": torch.cuda.memory_allocated() if gpu else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def steps_within(seconds: float, config: Config, task: Bf16Task, device: Device) -> int:
    """The number of steps of a configuration that fit into a time budget, including validations.

    The time per step is measured on a temporary model after 5 untimed steps. The measurement ends
    after PROBE steps or a tenth of the budget.
    """
    free_memory(device)
    model = config.model(task)
    optimizer = config.optimizer(model, 0)
    clock = Clock(device)
    taken: list[float] = []
    for index in range(-5, PROBE):
        device.synchronize()
        began = time.perf_counter()
        training_step(task, model, optimizer, index % PROBE, clock)
        device.synchronize()
        if index >= 0:
            taken.append(time.perf_counter() - began)
        if sum(taken) > seconds / 10:
            break
    validate(task, model)
    began = time.perf_counter()
    validate(task, model)
    left = seconds - VALIDATIONS * (time.perf_counter() - began)
    fitting = int(left / statistics.median(taken))
    return max(20, fitting // 10 * 10)


def run_missing(args: argparse.Namespace, size: Size, device: Device) -> None:
    """Train every configuration and seed without a line in the file; append each line at once."""
    corpus = load(size.corpus_bytes)
    common = json.loads(json.dumps(settings(size, corpus)))  # JSON turns tuples into lists
    on_device = replace(
        corpus, train=corpus.train.to(device.type), validation=corpus.validation.to(device.type)
    )
    env = results.environment(device.type)
    lines = [] if args.no_write else results.read_lines(args.out or OUT)
    lines = [line for line in lines if line.get("kind") == KIND]
    known = {run_key(line) for line in lines}
    chosen = []
    for config in CONFIGS:
        if args.names and config.name not in args.names:
            continue
        if why := config.unavailable(device):
            print(f"not measured: {config.name}: {why}", flush=True)
        else:
            chosen.append(config)
    if not chosen:
        return
    steps, seconds = size.steps, None
    if steps is None:
        seconds = args.seconds or SECONDS
        steps = _steps_of(lines, env["device"], common, seconds)
        if steps is None:
            probe = task_of(size, on_device, device, args.first_seed, PROBE)
            steps = steps_within(seconds, chosen[0], probe, device)
            print(f"{steps} steps fit into {seconds:g} s of {chosen[0].name}", flush=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        task = None
        for config in chosen:
            own = {**config.settings(), **common, "steps": steps}
            start = {**env, "kind": KIND, "settings": own, "seed": seed}
            if run_key(start) in known:
                continue
            task = task or task_of(size, on_device, device, seed, steps)
            try:
                found = train(config, task, seed, device)
            except (RuntimeError, NotImplementedError) as error:
                if config.library != "bitsandbytes":
                    raise
                print(f"not measured: {config.name}: {error}", flush=True)
                continue
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            line = {
                **start,
                "date": now,
                "budget_seconds": seconds,
                **config.provider(device),
                **found,
            }
            keep(args, KIND, [line])
            print(
                f"seed {seed}  {config.name:<24} loss {found['validation_loss']:.4f}  "
                f"{found['tokens_per_second']:,.0f} tokens/s  optimizer "
                f"{found['optimizer_share']:.2%} of a step  {found['seconds']:.0f} s",
                flush=True,
            )


def _steps_of(lines: Sequence[Line], device: str, common: Line, seconds: float) -> int | None:
    """The number of steps that an earlier run chose for the same time budget, or None."""
    for line in reversed(lines):
        same = all(line["settings"].get(name) == value for name, value in common.items())
        if same and line["device"] == device and line["budget_seconds"] == seconds:
            return int(line["settings"]["steps"])
    return None


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(KIND, __doc__)
    names = [config.name for config in CONFIGS]
    parser.add_argument(
        "--configs",
        dest="names",
        metavar="NAME",
        nargs="+",
        choices=names,
        help=f"configurations to train (default all): {', '.join(names)}",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="steps of every configuration")
    length.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"time budget per configuration (default {SECONDS:g}). The time per step of the first "
        "configuration, measured after warm-up, gives the number of steps. All configurations "
        "train for this number of steps, and so do later runs with the same settings into the same "
        "file",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"windows per step (default {FULL.batch})"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="number of seeds (default 1)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first seed (default 0)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="train a tiny model for a few steps; needs --out or --no-write",
    )
    parser.add_argument(
        "--report", action="store_true", help="write the page from the lines and stop"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=results.ROOT / "docs",
        metavar="DIR",
        help="folder that --report writes to (default docs)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train the missing runs, or write the page.

    Returns:
        0 on success; 2 on wrong usage, if the device is missing, or if there is nothing to report.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.report:
        return pretrain_report.write(args.out or OUT, args.docs)
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above 0; got {args.seconds:g}")
    if args.first_seed < 0:
        parser.error(f"--first-seed must be at least 0; got {args.first_seed}")
    default_file = args.out is None or args.out.resolve() == OUT.resolve()
    if args.quick and default_file and not args.no_write:
        parser.error(
            "--quick must not write to the default result file: select another file with --out"
        )
    device = device_of(parser, args, "steps", "batch", "seeds")
    if device is None:
        return 2
    size = QUICK if args.quick else FULL
    if args.steps is not None or args.seconds is not None:
        size = replace(size, steps=args.steps)
    if args.batch is not None:
        size = replace(size, batch=args.batch)
    run_missing(args, size, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
