"""``python -m bench.gpu``: steps on the GPU, timed by device events, in turns; appends to results.

A sample is one ``step()`` between two events on the current stream, gradients in place; the host
runs ahead, so it is device time unless the host is the slower of the two. host_us is the time that
``step()`` keeps the host, over the list of many small tensors.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import onepass

from . import results
from .cases import DTYPES, OPTIONS, Case
from .lists import llama, many
from .measure import percentile

SAMPLES = 25
WARM_UP = 3
PROVIDERS = ("onepass-cuda", "onepass-triton", "torch")
HOST_STEPS = 50
NAMES = {"adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "lion": "Lion"}
# torch's own step of each rule: fused where it has that for CUDA, else of few launches a list.
TORCH = {"adamw": "fused", "sgd": "fused", "adagrad": "foreach", "rmsprop": "foreach"}
LARGEST_COPY = 1 << 33
"""Bytes read and written by the copy at most, so that it fits beside all providers."""


@dataclass
class Timed:
    """A provider's step, the bytes it moves, and its samples in milliseconds."""

    provider: str
    step: Callable[[], Any]
    bytes: int
    samples: list[float] = field(default_factory=list)
    host_us: float | None = None
    peak_bytes: int | None = None


def cases(quick: bool) -> list[Case]:
    """The cases; quick has small lists, to try the script itself."""
    big = llama(64, 2, 1000) if quick else llama(2048, 16, 128_256)
    small = many(300, 256) if quick else many(20_000, 256)
    found = [Case(rule, "fp32", "fp32", big) for rule in OPTIONS]
    found += [Case("adamw", "bf16", states, big) for states in ("bf16", "fp32")]
    found += [Case("adamw", "bf16", states, big, "split16") for states in ("bf16", "mx8")]
    return [*found, *(Case("adamw", "fp32", "fp32", p) for p in (many(300, 256), small))]


def steps_of(case: Case, providers: Sequence[str] = PROVIDERS) -> list[Timed]:
    """Each provider on parameters of its own, gradients shared, and the copy."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator("cuda").manual_seed(1)
    grads = [torch.empty(s, dtype=dtype, device="cuda") for s in case.list.shapes]
    for grad in grads:
        grad.normal_(0.0, 0.01, generator=generator)
    found = []
    for provider in providers:
        if provider == "torch":
            if case.rule not in TORCH or case.dtype != case.states or case.weights != "native":
                continue
            how = TORCH[case.rule]
            provider = f"torch-{how}"
            make = getattr(torch.optim, NAMES[case.rule])
            extra: dict[str, Any] = {how: True}
        else:
            backend = provider.removeprefix("onepass-")
            why = onepass.backends.BACKENDS[backend].unavailable(torch.device("cuda"))
            if why:
                print(f"{provider}: {why}", file=sys.stderr)
                continue
            make = getattr(onepass, NAMES[case.rule])
            extra = {"states": case.states, "weights": case.weights, "backend": backend}
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = make(params, **OPTIONS[case.rule], **extra)
        found.append(Timed(provider, optimizer.step, case.bytes))
    half = min(max(case.bytes, 1 << 30), LARGEST_COPY) // 8
    source, target = torch.ones(half, device="cuda"), torch.empty(half, device="cuda")
    found.append(Timed("copy", lambda: target.copy_(source), 8 * half))
    return found


def measure(case: Case, samples: int) -> list[Timed]:
    """Samples of every provider of a case, in an order shuffled at every turn."""
    timed = steps_of(case)
    for one in timed:
        for _ in range(WARM_UP):
            one.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one.step()
        one.peak_bytes = torch.cuda.max_memory_allocated() - before
        if one.provider != "copy" and len(case.list.shapes) >= 300:
            one.host_us = host_time(one.step)
    shuffle = random.Random(0)
    for _ in range(samples):
        for one in shuffle.sample(timed, len(timed)):
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # the host gets ahead before the first event
            start.record()
            one.step()
            end.record()
            end.synchronize()
            one.samples.append(start.elapsed_time(end))
    return timed


def only_steps(steps: int) -> None:
    """Steps for a profiler, which may save and restore all that a kernel writes: a list that is
    large for a cache, small for that."""
    for case in (
        Case("adamw", "fp32", "fp32", llama(1024, 8, 32_000)),
        Case("adamw", "bf16", "mx8", llama(1024, 8, 32_000), "split16"),
    ):
        (ours, _) = steps_of(case, ("onepass-cuda",))
        for _ in range(steps):
            ours.step()
    torch.cuda.synchronize()


def host_time(step: Callable[[], Any]) -> float:
    """Microseconds that the host spends in a step, the median of several."""
    torch.cuda.synchronize()
    spent = []
    for _ in range(HOST_STEPS):
        start = time.perf_counter_ns()
        step()
        spent.append((time.perf_counter_ns() - start) / 1e3)
        torch.cuda.synchronize()
    return percentile(spent, 50)


def lines_of(case: Case, timed: Sequence[Timed]) -> list[results.Line]:
    """The result lines of a case (bench/results.py names their fields)."""
    env = results.environment("cuda")

    def gbps(one: Timed) -> float:
        return one.bytes / percentile(one.samples, 50) / 1e6

    copy = next(gbps(one) for one in timed if one.provider == "copy")
    found = []
    for one in timed:
        ours = one.provider.startswith("onepass")
        line = env | {
            "provider": one.provider,
            "provider_version": onepass_version() if ours else str(torch.__version__),
            "rule": case.rule,
            "states": case.states,
            "weights": case.weights,
            "param_dtype": case.dtype,
            "grad_dtype": case.dtype,
            "list": case.list.name,
            "numel": case.list.numel,
            "tensors": len(case.list.shapes),
            "bytes": one.bytes,
            "ms": {f"p{p}": round(percentile(one.samples, p), 5) for p in (20, 50, 80)},
            "samples": [round(sample, 5) for sample in one.samples],
            "gbps": round(gbps(one), 2),
            "copy_gbps": round(copy, 2),
            "share": round(gbps(one) / copy, 4),
            "host_us": None if one.host_us is None else round(one.host_us, 2),
            "peak_bytes": one.peak_bytes,
        }
        found.append({name: line[name] for name in results.FIELDS})
    return found


def onepass_version() -> str:
    """Of the package, installed or not."""
    return results._version("onepass") or "source"


def main(argv: list[str] | None = None) -> int:
    """Measures; 0 done, 2 there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small lists; writes no file")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, help="take as many of onepass-cuda, time nothing")
    default = results.ROOT / "bench" / "results" / "gpu.jsonl"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: there is no GPU here", file=sys.stderr)
        return 2
    if args.steps:
        only_steps(args.steps)
        return 0
    for case in cases(args.quick):
        found = lines_of(case, measure(case, args.samples))
        gc.collect()
        torch.cuda.empty_cache()
        if not args.quick:
            results.append(args.out, found)
        print(f"\n{case.name}: {case.bytes / 1e6:,.3f} MB a step")
        for line in found:
            host = "" if line["host_us"] is None else f"{line['host_us']:>10,.0f} us host"
            print(
                f"{line['provider']:<16} {line['ms']['p50']:>9.3f} ms {line['gbps']:>9.1f} GB/s "
                f"{line['share']:>6.3f} of copy{host}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
