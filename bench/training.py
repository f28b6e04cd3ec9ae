"""``python -m bench.training``: trains a small GPT with each format, from the same seeds.

A broken format whose steps are too large can have a lower loss, so the size of the steps is
measured as well: every run also computes exact fp32 averages (moments) of its own gradients, and
each step is compared with the step that the exact averages give.

Each finished run appends one line to bench/results/training.jsonl. Runs that already have a line
are skipped, so an interrupted benchmark can be continued. ``--report`` writes docs/training.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass.engine import numpy_codec
from onepass.formats import STATE_FORMATS, scale_key
from onepass_tools.demo.data import Batches, Corpus, load
from onepass_tools.demo.model import Shape, count_parameters, initial_weights, parameter_groups
from onepass_tools.demo.train import MAX_GRAD_NORM, Task, backward, schedule, state_bytes, validate

from . import results, training_report
from .results import Line
from .runs import Run, add_arguments, check_arguments, run_missing

OUT = results.ROOT / "bench" / "results" / "training.jsonl"
EPS = 1e-8
# The options of the demo, except beta2: 0.999 is torch's default and harder for a format.
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "betas": (0.9, 0.999), "weight_decay": 0.1},
    "lion": {"lr": 5e-4, "betas": (0.9, 0.99), "weight_decay": 0.5},
}


@dataclass(frozen=True)
class Config:
    """A configuration: a rule and its formats.

    Attributes:
        name: the name for ``--configs``, in the result lines and on the page.
        rule: key of RULES.
        dtype: dtype of the weights.
        weights, states: formats of the weights and the states.
        baseline: name of the configuration that it is compared with; "" for none.
        perturbed: whether every initial weight is moved to one of its two neighbours in fp32.
    """

    name: str
    rule: str
    dtype: str
    weights: str
    states: str
    baseline: str
    perturbed: bool = False


CONFIGS = (
    Config("fp32", "adamw", "fp32", "native", "fp32", ""),
    Config("fp32, last bits changed", "adamw", "fp32", "native", "fp32", "fp32", perturbed=True),
    Config("bf16 + split8 + mx8", "adamw", "bf16", "split8", "mx8", "fp32"),
    Config("bf16 + stochastic + mx8", "adamw", "bf16", "stochastic", "mx8", "fp32"),
    Config("bf16 + stochastic + mx4", "adamw", "bf16", "stochastic", "mx4", "fp32"),
    Config("Lion fp32", "lion", "fp32", "native", "fp32", ""),
    Config("Lion mx8", "lion", "fp32", "native", "mx8", "Lion fp32"),
    # Shows why the stochastic formats exist: the same states, but weights rounded to nearest.
    Config("bf16 + native + mx8", "adamw", "bf16", "native", "mx8", "fp32"),
)


@dataclass(frozen=True)
class Size:
    """The amount of work in a run.

    Attributes:
        shape: the shape of the model.
        batch: windows per step.
        steps: training steps.
        validation_batches: batches of the validation.
        corpus_bytes: bytes of text.
        sampled: every how many steps a step is compared with that of exact averages.
    """

    shape: Shape
    batch: int
    steps: int
    validation_batches: int
    corpus_bytes: int
    sampled: int


FULL = Size(Shape(64, 96, 2, 4), 8, 500, 64, 8_000_000, 5)
QUICK = Size(Shape(16, 16, 1, 2), 4, 6, 2, 400_000, 2)


def settings(config: Config, size: Size) -> Line:
    """Everything that the result of a run depends on except the seed and the machine."""
    return {**asdict(config), **RULES[config.rule], "max_grad_norm": MAX_GRAD_NORM, **asdict(size)}


def initial(config: Config, shape: Shape, seed: int) -> dict[str, Tensor]:
    """The initial weights, in fp32."""
    found = initial_weights(shape, seed)
    if not config.perturbed:
        return found
    generator = torch.Generator().manual_seed(seed)
    for name, weight in found.items():
        up = torch.rand(weight.shape, generator=generator) < 0.5
        found[name] = torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf))
    return found


def step_of(
    rule: str, averages: Sequence[Tensor], grad: Tensor, t: int
) -> tuple[Tensor, list[Tensor]]:
    """Computes the t-th step in fp32, without changing its arguments.

    Returns:
        (step without weight decay divided by the learning rate, new averages).
    """
    (first, second), (beta1, beta2) = averages, RULES[rule]["betas"]
    if rule == "lion":
        u = torch.sign(beta1 * first + (1 - beta1) * grad)
        return u, [beta2 * first + (1 - beta2) * grad, second]
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    root = (second / (1 - beta2**t)).sqrt()
    return first / (1 - beta1**t) / (root + EPS), [first, second]


class Compared:
    """Statistics of steps, compared with the steps that exact averages of the gradients give.

    All steps are divided by the learning rate.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._largest = 0.0

    def add(self, taken: Tensor, exact: Tensor) -> None:
        """Adds one step, as taken and as exact averages give it."""
        u, v = taken.double(), exact.double()
        terms = (u @ u, v @ v, u @ v, (u.sign() != v.sign()).sum().double())
        self._sums += torch.stack([*terms, torch.tensor(u.numel(), dtype=torch.float64)])
        self._largest = max(self._largest, float(u.abs().max()))

    def line(self) -> Line:
        """The statistics as fields of a result line.

        rms_u and rms_u_exact: root mean square of the steps taken and of the exact steps;
        projection: the step taken projected on the exact step, as a fraction of it; signs_differ:
        the share of elements whose signs differ; max_u: the largest magnitude of a step.
        """
        own, exact, product, signs, count = self._sums.tolist()
        return {
            "rms_u": (own / count) ** 0.5,
            "rms_u_exact": (exact / count) ** 0.5,
            "projection": product / exact,
            "signs_differ": signs / count,
            "max_u": self._largest,
        }


class Watch:
    """Compares the steps of an optimizer with those of exact averages of the same gradients.

    A step is divided by the learning rate and does not include weight decay.
    """

    def __init__(self, config: Config, optimizer: onepass.Optimizer) -> None:
        self._config, self._optimizer = config, optimizer
        count = sum(p.numel() for p in self._params())
        self._exact = [torch.zeros(count), torch.zeros(count)]
        self._steps = 0
        self.compared = Compared()

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _stored(self) -> list[Tensor]:
        """The averages that the optimizer stores, decoded."""
        rule, form = self._optimizer.rule, STATE_FORMATS[self._config.states]
        parts: list[list[Tensor]] = [[], []]
        for param in self._params():
            state = self._optimizer.state[param]
            keys = {i: key for i, key in enumerate(rule.keys) if key in state}
            codes = {i: state[key] for i, key in keys.items()}
            scales = {i: state[scale_key(k)] for i, k in keys.items() if scale_key(k) in state}
            values = numpy_codec.read_states(form, rule.kinds, codes, scales, param.numel())
            for slot, part in enumerate(parts):
                value = values[slot] if slot < len(values) else None
                part.append(torch.zeros(param.numel()) if value is None else torch.tensor(value))
        return [torch.cat(part) for part in parts]

    def before_step(self, look: bool) -> None:
        """Updates the exact averages with the current gradients.

        Args:
            look: whether to compare the coming step.
        """
        self._steps += 1
        grads = [p.grad for p in self._params()]
        grad = torch.cat([numpy_codec.flat(g).float() for g in grads if g is not None])
        exact, self._exact = step_of(self._config.rule, self._exact, grad, self._steps)
        if look:
            taken, _ = step_of(self._config.rule, self._stored(), grad, self._steps)
            self.compared.add(taken, exact)


def task_of(size: Size, seed: int, corpus: Corpus, weights: dict[str, Tensor]) -> Task:
    """The initial weights, and the batches of a seed, on the CPU.

    The validation windows are the same for every seed.
    """
    context = size.shape.context
    return Task(
        shape=size.shape,
        device=torch.device("cpu"),
        weights=weights,
        train=Batches(corpus.train, size.steps, size.batch, context, seed),
        validation=Batches(corpus.validation, size.validation_batches, size.batch, context, 0),
    )


def train(config: Config, size: Size, seed: int, corpus: Corpus) -> Line:
    """Trains one run; returns the final validation loss and the statistics of :class:`Watch`.

    The model computes in fp32 with the values of the weights, so that runs differ only in the
    formats of the optimizer. 16-bit weights get 16-bit gradients.
    """
    began = time.perf_counter()
    task = task_of(size, seed, corpus, initial(config, size.shape, seed))
    model = task.model()
    held = task.model().to(torch.bfloat16) if config.dtype == "bf16" else model
    options = RULES[config.rule]
    make = {"adamw": onepass.AdamW, "lion": onepass.Lion}[config.rule]
    optimizer = make(
        parameter_groups(held, options["weight_decay"]),
        lr=options["lr"],
        betas=options["betas"],
        weights=config.weights,
        states=config.states,
        seed=seed,
    )
    scheduler = schedule(optimizer, size.steps)
    watch = Watch(config, optimizer)
    pairs = list(zip(model.parameters(), held.parameters(), strict=True))

    @torch.no_grad()
    def show_weights() -> None:
        for param, own in pairs:
            param.copy_(own)

    show_weights()
    losses = []
    for step in range(1, size.steps + 1):
        losses.append(float(backward(task, model, step - 1)))
        if held is not model:
            for param, own in pairs:
                assert param.grad is not None
                own.grad = param.grad.to(own.dtype)
        watch.before_step(look=step % size.sampled == 0)
        optimizer.step()
        model.zero_grad()
        if held is not model:
            show_weights()
        scheduler.step()
    tail = losses[-max(1, size.steps // 10) :]
    return {
        "parameters": count_parameters(held),
        "validation_loss": validate(task, model),
        "train_loss": sum(tail) / len(tail),  # of the last tenth of the steps
        **watch.compared.line(),
        "state_bytes": state_bytes(optimizer) / count_parameters(held),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains the missing runs, or writes the page.

    Returns:
        0 on success; 2 on wrong usage or if there is nothing to report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description="Trains a small GPT with each format."
    )
    names = [config.name for config in CONFIGS]
    parser.add_argument("--report", action="store_true", help="write docs/training.md and stop")
    parser.add_argument(
        "--docs",
        type=Path,
        default=results.ROOT / "docs",
        metavar="DIR",
        help="folder that --report writes to (default docs)",
    )
    add_arguments(parser, "--configs", names, OUT, seeds=5)
    args = parser.parse_args(argv)
    if args.report:
        return training_report.write(args.out, args.docs, names)
    check_arguments(parser, args)
    size = QUICK if args.quick else FULL
    corpus = load(size.corpus_bytes)

    def run(config: Config) -> Run:
        return Run(
            config.name, settings(config, size), lambda seed: train(config, size, seed, corpus)
        )

    run_missing(args, "training", [run(config) for config in CONFIGS], _shown)
    return 0


def _shown(line: Line) -> str:
    return f"rms u {line['rms_u']:.4f}  projection {line['projection']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
