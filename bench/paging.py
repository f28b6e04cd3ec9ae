"""``python -m bench.paging``: measures the cost of paged states; appends result lines.

On every device: the additional host time per page, from steps with two different numbers of pages.
On a GPU also: a step whose states are all in host memory, compared with the time in which the link
moves as many bytes in both directions at once (measured before and after), and with the paged
optimizers of bitsandbytes if it is installed; and the device memory of each.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import onepass
from onepass.paging import Paging
from onepass.paging.options import SMALLEST_PAGE
from onepass_tools.benchmark.devices import DEVICES
from onepass_tools.benchmark.timing import percentile

from . import results

SHARE = 0.9
"""Target: the share of the link's bandwidth that a step reaches, with at least STATE_BYTES of
states."""
STATE_BYTES = 8 << 30
TIMES_BITSANDBYTES = 3.0
"""Target: the time of a step of bitsandbytes divided by that of onepass."""
NUMELS = (1 << 16, 1 << 19)
LINK_BYTES = 1 << 30


def right(device: torch.device) -> bool:
    """Whether three paged steps over many pages return the same bits as three unpaged steps."""
    found = []
    for paged in (Paging(page_bytes=SMALLEST_PAGE), False):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 1 << 16, device=device))
        param.grad = torch.linspace(0.5, -2, 1 << 16, device=device)
        optimizer = onepass.AdamW([param], states="mx8", paged=paged)
        for _ in range(3):
            optimizer.step()
        found += [param.detach().cpu(), optimizer.state[param]["exp_avg"].cpu()]
    return torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def host_us_a_page(states: Any, device: torch.device, samples: int) -> float:
    """Additional host time per page in microseconds: the slope between two sizes of a tensor."""
    pages, spent = [], []
    for numel in NUMELS:
        param = torch.nn.Parameter(torch.zeros(numel, device=device))
        param.grad = torch.zeros_like(param)
        plain = onepass.AdamW([param], states=states)
        paged = onepass.AdamW([param], states=states, paged=Paging(page_bytes=SMALLEST_PAGE))
        both = [percentile(_host_us(o.step, samples), 50) for o in (paged, plain)]
        spent.append(both[0] - both[1])
        pages.append(onepass.paging.footprints(paged)[param.device].host / SMALLEST_PAGE)
    return (spent[1] - spent[0]) / (pages[1] - pages[0])


def _host_us(step: Callable[[], Any], samples: int) -> list[float]:
    """Host times of single steps in microseconds, after five untimed steps."""
    found = []
    for i in range(samples + 5):
        start = time.perf_counter_ns()
        step()
        spent = (time.perf_counter_ns() - start) / 1e3
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 5:
            found.append(spent)
    return found


def link_step() -> tuple[Callable[[], None], int]:
    """A function that copies in both directions at once, and its bytes per direction."""
    host = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def step() -> None:
        now = torch.cuda.current_stream()
        pairs = ((device[0], host[0]), (host[1], device[1]))
        for stream, (target, source) in zip(streams, pairs, strict=True):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            now.wait_stream(stream)

    return step, LINK_BYTES


def providers() -> dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float]]:
    """Name -> (function that makes the optimizer, bytes of states per element)."""
    found: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float]] = {
        "onepass-fp32": (lambda p: onepass.PagedAdamW(p), 8.0),
        "onepass-mx8": (lambda p: onepass.PagedAdamW8bit(p), 2 * (1 + 1 / 32)),
    }
    try:
        theirs = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        print(f"bench.paging: bitsandbytes is not measured: {error}", file=sys.stderr)
    else:
        found["bitsandbytes-fp32"] = (theirs.PagedAdamW, 8.0)
        found["bitsandbytes-8bit"] = (theirs.PagedAdamW8bit, 2 * (1 + 4 / 256))
    return found


def measure(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Measures the providers one after the other, because they do not fit in memory together.

    The link is measured before and after each provider.
    """
    shapes = _shapes(64, 2, 1000) if quick else _shapes(2048, 19, 32_000)
    params = [
        torch.nn.Parameter(torch.zeros(s, dtype=torch.bfloat16, device="cuda")) for s in shapes
    ]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    numel = sum(p.numel() for p in params)
    link, link_bytes = link_step()
    for name, (make, each) in providers().items():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        optimizer = make(params)
        links = _device_ms(link, 5)
        for _ in range(3):
            optimizer.step()
        took = _step_ms(optimizer, samples)
        links += _device_ms(link, 5)
        rate = link_bytes / percentile(links, 50) / 1e6
        moved = numel * each
        gbps = moved / percentile(took, 50) / 1e6
        line = {
            "provider": name,
            "numel": numel,
            "state_bytes": round(moved),
            "ms": {f"p{n}": round(percentile(took, n), 4) for n in (20, 50, 80)},
            "gbps_each_way": round(gbps, 2),
            "link_gbps_each_way": round(rate, 2),
            "share": round(gbps / rate, 4),
            # torch does not track managed memory: use the free memory of the device.
            "device_bytes": before - torch.cuda.mem_get_info()[0],
        }
        if isinstance(optimizer, onepass.optim.Optimizer):
            (footprint,) = onepass.paging.footprints(optimizer).values()
            line["predicted_bytes"] = footprint.resident + footprint.ring
        yield line
        del optimizer
        gc.collect()


def _shapes(width: int, layers: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of a Llama 3 model with tied embeddings."""
    narrow, inner = width // 4, 4 * width
    attention = ((width, width), (narrow, width), (narrow, width), (width, width))
    block = (*attention, (inner, width), (inner, width), (width, inner), (width,), (width,))
    return ((vocabulary, width), *block * layers, (width,))


def _device_ms(step: Callable[[], Any], samples: int) -> list[float]:
    """Device times of single calls in milliseconds."""
    return [DEVICES["cuda"].time(step) for _ in range(samples)]


def _step_ms(optimizer: torch.optim.Optimizer, samples: int) -> list[float]:
    """Wall time per step in milliseconds, each over three steps until their last copy is done."""
    found = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        found.append((time.perf_counter_ns() - start) / 3e6)
    return found


def judged(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Compares the result lines with the targets; one sentence per target."""
    by_name = {line["provider"]: line for line in lines}
    said = []
    for ours, theirs in (
        ("onepass-fp32", "bitsandbytes-fp32"),
        ("onepass-mx8", "bitsandbytes-8bit"),
    ):
        line = by_name[ours]
        if line["state_bytes"] >= STATE_BYTES:
            said.append(f"{ours}: {line['share']:.3f} of the link's bandwidth (target {SHARE})")
        if theirs in by_name:
            times = by_name[theirs]["ms"]["p50"] / line["ms"]["p50"]
            said.append(
                f"{ours}: {times:.2f} times as fast as {theirs} (target {TIMES_BITSANDBYTES})"
            )
    return said


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 0 on success, 1 if a result is wrong, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.paging", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small lists; write no file")
    parser.add_argument(
        "--samples", type=int, default=20, help="timings per provider on a GPU (default 20)"
    )
    default = results.ROOT / "bench" / "results" / "paging.jsonl"
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="FILE",
        help="append result lines to FILE (default bench/results/paging.jsonl)",
    )
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"--samples must be at least 1; got {args.samples}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    env = results.environment(device.type)
    if not right(device):
        print("bench.paging: paged and unpaged steps returned different bits", file=sys.stderr)
        return 1
    out = None if args.quick else args.out

    def keep(kind: str, line: results.Line) -> None:
        if out is not None:
            results.append(out, [{**env, "kind": kind, **line}])

    for states in ("fp32", "mx8"):
        spent = host_us_a_page(states, device, 20 if args.quick else 200)
        keep("page", {"states": states, "host_us": round(spent, 2)})
        print(f"{states}: {spent:.1f} us of host time per page")
    if gpu:
        found = []
        for line in measure(args.samples, args.quick):
            found.append(line)
            keep("paging", line)
            print(", ".join(f"{key} {value}" for key, value in line.items()))
        print("\n".join(judged(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
