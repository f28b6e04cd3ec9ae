"""The implementation of `onepass memory`: check options, make reports, print and write them."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onepass.memory import MemoryReport, Sample
from onepass.memory.advice import TASKS, cheapest_change, recommend
from onepass.memory.gpus import capacity
from onepass.memory.models import Model, find
from onepass.memory.peers import DEFAULT as DEFAULT_PEERS
from onepass.memory.probes import free_memory
from onepass.memory.report import TOLERANCE
from onepass.memory.scenarios import Candidate, Terms, candidate, predicted, report
from onepass.memory.shards import check as check_shards
from onepass.memory.shards import parse_mesh
from onepass.memory.simulate import CannotSimulateError
from onepass.memory.sizes import parse_size, show
from onepass.suggestions import did_you_mean
from onepass_tools import UsageError, package_version
from onepass_tools.device_names import device_name
from onepass_tools.memory import table
from onepass_tools.memory.defaults import OPTIMIZERS

_DTYPES = {
    **dict.fromkeys(("fp32", "float32"), torch.float32),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "float16"), torch.float16),
}
_UNCOUNTED = (
    "not counted: activations and the memory of the CUDA runtime; all gradients of a step are "
    "counted (onepass.release_gradients frees each of them at once)"
)
_ACTIVATIONS = (
    "activations: by a formula, as far as they exceed the gradients that replace them in the "
    "backward pass; not counted: dropout and the memory of the CUDA runtime"
)
_FORMULA = "* predicted by a formula, because the optimizer cannot be run or simulated here"


@dataclass
class Asked:
    """The validated options.

    Attributes:
        model: the model.
        choices: the optimizers to report on.
        terms: the settings of the run.
        limit: bytes of memory of one GPU; None if no limit was given.
        reserve: bytes of ``limit`` to leave for activations.
        rank: the rank of LoRA adapters.
    """

    model: Model
    choices: list[Candidate]
    terms: Terms
    limit: int | None
    reserve: int
    rank: int

    @property
    def title(self) -> str:
        """The title of the report: model, parameters, dtypes and sharding."""
        terms = self.terms
        dtype = str(terms.dtype).removeprefix("torch.")
        parts = [f"{self.model.name}: {self.model.numel:,} parameters in {dtype}"]
        if self.model.trained != self.model.numel:
            parts.append(f"{self.model.trained:,} of them trained")
        if terms.grad_dtype not in (None, terms.dtype):
            parts.append(f"gradients in {str(terms.grad_dtype).removeprefix('torch.')}")
        if terms.careful:
            parts.append("norms and states of embeddings and norms in fp32")
        if terms.mesh.ranks > 1:
            parts.append(f"one of {terms.mesh.ranks} GPUs ({terms.mesh})")
        return ", ".join(parts)


def run(args: argparse.Namespace) -> int:
    """Run the command after the package checks of :func:`onepass_tools.memory.run`."""
    asked = _checked(args)
    if args.recommend:
        return _recommend(args, asked)
    if args.measure:
        _check_room(asked)
    reports = []
    with _progress(len(asked.choices), args.quiet or not args.measure) as tick:
        for choice in asked.choices:
            snapshot = None
            if args.snapshot is not None:
                snapshot = args.snapshot / f"{re.sub('[^a-z0-9.+-]', '-', choice.name)}.pickle"
            found = report(
                choice,
                asked.model,
                asked.terms,
                args.measure,
                snapshot,
                partial(_say, tick, choice.name),
            )
            reports.append(found)
            tick(choice.name, 1)
    notes = _remarks(asked, reports)
    if args.measure:
        notes.append(f"measured on {_environment(asked.terms.device)}")
    _output(args, asked, reports, notes)
    off = [r for r in reports if r.ours and abs(r.difference() or 0.0) > TOLERANCE]
    for found in off:
        print(
            f"onepass: {found.name}: the measured peak "
            f"{show(found.measured.peak) if found.measured else ''} differs from the prediction by "
            f"more than {100 * TOLERANCE:g} %",
            file=sys.stderr,
        )
    return 1 if off else 0


def _say(tick: Callable[[str, int], None], name: str, words: str) -> None:
    tick(f"{name}: {words}", 0)


def _checked(args: argparse.Namespace) -> Asked:
    if not args.model:
        raise UsageError(
            "--model is missing: give a name of --list-models, a config.json or module:factory"
        )
    mesh = parse_mesh(args.mesh)
    scale = _number("--scale", args.scale, float)
    _choice("--task", args.task, TASKS)
    _choice("--device", args.device, ("auto", "cpu", "cuda"))
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and args.measure and not has_cuda:
        raise UsageError("--device cuda needs a GPU: torch finds no CUDA device")
    # Predictions without a measurement are for a GPU, because users choose the GPU.
    real = args.measure and (args.device == "cpu" or not has_cuda)
    device = "cpu" if real or args.device == "cpu" else "cuda"
    if args.snapshot is not None:
        if not args.measure or device != "cuda":
            raise UsageError(
                "--snapshot records the CUDA allocator, so it needs --measure on a CUDA device"
            )
        args.snapshot.mkdir(parents=True, exist_ok=True)
    limit = capacity(args.gpu) if args.gpu else None
    reserve = parse_size(args.reserve) if args.reserve else 0
    if args.reserve and limit is None:
        raise UsageError("--reserve needs --gpu: it is a part of the memory of the GPU")
    if limit is not None and reserve >= limit:
        raise UsageError(f"--reserve must be below --gpu {args.gpu}; got {args.reserve}")
    if args.recommend and limit is None:
        raise UsageError("--recommend needs --gpu, for example --gpu 24GB")
    if args.measure and mesh.ranks > 1:
        raise UsageError(
            f"--measure uses one device, so it cannot be combined with --mesh {mesh} (--scale also "
            "makes the model smaller)"
        )
    if args.measure and args.recommend:
        raise UsageError(
            "--recommend and --measure cannot be combined: --recommend predicts; measure the "
            "recommended optimizer with --optimizers"
        )
    terms = Terms(
        _dtype("--dtype", args.dtype),
        _dtype("--grad-dtype", args.grad_dtype) if args.grad_dtype else None,
        args.parameter_groups,
        mesh,
        device,
        _sample(args),
    )
    names = (args.optimizers or OPTIMIZERS).split(",")
    if not args.optimizers and terms.dtype != torch.bfloat16:
        names = [name for name in names if "split" not in name]
    if args.peers:
        names += [name for name in DEFAULT_PEERS if name not in names]
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise UsageError("--optimizers is empty: give names separated by commas")
    choices = [candidate(name) for name in names]
    model = find(args.model).scaled(scale)
    return Asked(model, choices, terms, limit, reserve, _number("--rank", args.rank, int))


def _sample(args: argparse.Namespace) -> Sample | None:
    if args.sample is None:
        return None
    if args.measure:
        raise UsageError("--measure takes steps without activations: leave out --sample")
    match = re.fullmatch(r"(\d+)x(\d+)", args.sample)
    if match is None:
        raise UsageError(f"--sample must be BATCHxTOKENS, for example 4x2048; got {args.sample}")
    return Sample(int(match[1]), int(match[2]), args.checkpointing, args.attention)


def _number(option: str, text: str, kind: Callable[[str], Any]) -> Any:
    wanted = "a whole number of at least 1" if kind is int else "a number above 0, at most 1"
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"{option} must be {wanted}; got {text}") from None
    if not value > 0 or (kind is float and value > 1):
        raise UsageError(f"{option} must be {wanted}; got {text}")
    return value


def _choice(option: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        meant = did_you_mean(value, accepted) or "."
        raise UsageError(
            f"{option} has no choice {value}{meant} It must be one of {', '.join(accepted)}"
        )


def _dtype(option: str, name: str) -> torch.dtype:
    _choice(option, name, tuple(_DTYPES))
    return _DTYPES[name]


def _check_room(asked: Asked) -> None:
    """Raises UsageError if a measurement does not fit in the memory of the machine."""
    free = free_memory(asked.terms.device)
    worst = 0
    for choice in asked.choices:
        try:
            found = predicted(choice, asked.model, asked.terms)
        except CannotSimulateError:
            continue
        # On a CPU, paged states are in the same memory as everything else.
        worst = max(worst, found.peak + (found.host if asked.terms.device == "cpu" else 0))
    if free is not None and worst > free:
        scale = float(f"{0.8 * free / worst:.1g}")
        raise UsageError(
            f"--measure needs {show(worst)}, but only {show(free)} are free: measure a smaller "
            f"model with --scale {scale:g}"
        )


@contextmanager
def _progress(total: int, silent: bool) -> Iterator[Callable[[str, int], None]]:
    """Yields a function (text, number of steps done) that updates a bar if stderr is a terminal."""
    if silent or not sys.stderr.isatty():
        yield lambda words, done: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda words, done: None
        return
    with tqdm(total=total, file=sys.stderr, leave=False, unit="optimizer") as bar:

        def tick(words: str, done: int) -> None:
            bar.set_description(words)
            bar.update(done)

        yield tick


def _remarks(asked: Asked, reports: Sequence[MemoryReport]) -> list[str]:
    """The remarks below the table."""
    notes = [_FORMULA] if any(r.by_formula for r in reports) else []
    said = [(text, r.name) for r in reports for text in (r.problem, *r.notes) if text]
    notes += [f"{', '.join(names)}: {text}" for text, names in _grouped(said)]
    if asked.limit is not None:
        room, over = asked.limit - asked.reserve, []
        for choice, found in zip(asked.choices, reports, strict=True):
            if found.predicted is None or found.predicted.peak <= room:
                continue
            change = cheapest_change(choice, asked.model, asked.terms, room)
            over.append((str(change or "no change of options would fit"), found.name))
        for text, names in _grouped(over):
            verb = "does" if len(names) == 1 else "do"
            notes.append(f"{', '.join(names)} {verb} not fit; {text}")
    if asked.terms.mesh.fsdp > 1 and asked.terms.mesh.stage > 1:
        uneven = check_shards(asked.model, asked.terms.mesh.fsdp)
        notes += [uneven] if uneven else []
    return [*notes, _ACTIVATIONS if asked.terms.sample else _UNCOUNTED]


def _grouped(said: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(text, the names of the optimizers with this text), in the order of the first names."""
    found: dict[str, list[str]] = {}
    for text, name in said:
        found.setdefault(text, []).append(name)
    return list(found.items())


def _environment(device: str) -> str:
    """The device, versions and time of a measurement."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    versions = f"onepass {package_version('onepass')}, torch {torch.__version__}"
    return f"{device_name(torch.device(device))}; {versions}; {now}"


def _recommend(args: argparse.Namespace, asked: Asked) -> int:
    assert asked.limit is not None
    advice = recommend(asked.model, asked.terms, asked.limit, asked.reserve, args.task, asked.rank)
    asked = replace(asked, model=advice.model or asked.model)
    reasons = advice.reasons
    lines = [f"recommended for {args.task}: {reasons[0]}" if advice.chosen else reasons[0]]
    lines += [f"- {reason}" for reason in reasons[1:]]
    notes = [_ACTIVATIONS if asked.terms.sample else _UNCOUNTED]
    chosen = advice.chosen.name if advice.chosen else None
    extra = {"task": args.task, "recommended": chosen, "reasons": reasons}
    _output(args, asked, advice.reports, notes, lines, extra)
    return 0 if advice.chosen else 1


def _output(
    args: argparse.Namespace,
    asked: Asked,
    reports: Sequence[MemoryReport],
    notes: Sequence[str],
    lines: Sequence[str] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    rows = table.rows(reports, asked.limit, asked.reserve)
    if args.json:
        content = {
            "model": asked.model.name,
            "source": asked.model.source or None,
            "parameters": asked.model.numel,
            "trained": asked.model.trained,
            "dtype": str(asked.terms.dtype).removeprefix("torch."),
            "mesh": str(asked.terms.mesh) or None,
            "gpu": asked.limit,
            "reserve": asked.reserve,
            **(extra or {}),
            "optimizers": [_as_dict(r, asked) for r in reports],
            "notes": list(notes),
        }
        print(json.dumps(content, indent=2))
    elif args.csv:
        print(table.as_csv(reports), end="")
    else:
        table.print_lines([asked.title, ""])
        table.print_rows(rows)
        table.print_lines(["", *lines, *([""] if lines else []), *notes])
    written = []
    try:
        if args.plot is not None:
            from onepass.memory.plots import draw_bars

            draw_bars(args.plot, reports, asked.title, asked.limit)
            written.append(args.plot)
        if args.html is not None:
            from onepass.memory.html_report import page

            text = page(reports, asked.title, rows, [*lines, *notes], asked.limit)
            Path(args.html).write_text(text, "utf-8")
            written.append(args.html)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from error
    for path in written:
        if not args.quiet:
            print(f"wrote {path}", file=sys.stderr)


def _as_dict(found: MemoryReport, asked: Asked) -> dict[str, Any]:
    content = found.as_dict()
    if asked.limit is not None and found.predicted is not None:
        content["fits"] = found.predicted.peak <= asked.limit - asked.reserve
    return content
