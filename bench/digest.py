"""Checks that a backend returns the bits of the reference, by SHA-256 digests of step results.

``python -m bench.digest`` computes the digests of all cases and appends them to
bench/results/digests.jsonl. ``--check`` computes them on the given device, compares them with the
committed digests of the reference, and exits with 1 if one differs. So the results of a GPU can be
checked without computing the reference on that machine.

On a CPU the backend "cuda" is the stand-in of tests/cuda_shim, and "triton" needs
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass_tools.benchmark.devices import DEVICES

from . import results
from .digest_cases import DTYPES, LISTS, STORED, DigestCase, cases
from .results import Line

FILE = results.ROOT / "bench" / "results" / "digests.jsonl"
GPU_FILE = FILE.with_name("gpu-digests.jsonl")
DEFAULT = {"cpu": "reference,cpu", "cuda": "cuda,triton"}


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers that are the same on every machine and with every version of torch.

    Magnitudes are between 2^-20 and 2^3, and an eighth of the numbers is zero. Exact operations
    turn random words of NumPy's PCG64, whose stream is fixed, into fp32 numbers, which are then
    rounded once to the dtype.
    """
    count = int(np.prod(shape, dtype=np.int64))
    words = np.random.PCG64(seed).random_raw(count)
    mantissa = ((words & 0xFFF) | 0x1000).astype(np.float32)
    exponent = (words >> 12 & 0xFFFF).astype(np.int32) % 23 - 32
    value = np.ldexp(mantissa, exponent)
    value = np.where(words >> 28 & 1, -value, value)
    value = np.where(words >> 29 & 7, value, np.float32(0))
    return torch.from_numpy(value.astype(np.float32)).reshape(shape).to(dtype)


def digest(case: DigestCase, backend: str, device: str = "cpu") -> str:
    """SHA-256 of the parameters, states, gradients and norm after the steps of a case."""
    groups = list(_groups(case, device))
    owned = [(p, g["grad_dtype"]) for g in groups for p in g["params"]]
    kept = [{key: value for key, value in g.items() if key != "grad_dtype"} for g in groups]
    made: Callable[..., Any] = getattr(onepass, case.optimizer)
    optimizer = made(kept, **case.options, seed=case.seed, backend=backend)
    graph = None
    for step in range(case.steps):
        for i, (param, dtype) in enumerate(owned):
            _set_gradient(case, param, dtype, step, i)
        if graph is not None:
            graph.replay()
        elif case.graph and device == "cuda" and step == 1:
            graph = _captured(optimizer)
            graph.replay()
        else:
            optimizer.step()
    found = hashlib.sha256()
    for param, _ in owned:
        _add(found, "param", param.detach())
        _add(found, "grad", param.grad)
        for key in sorted(optimizer.state[param]):
            _add(found, key, optimizer.state[param][key])
    if "max_grad_norm" in case.options:
        _add(found, "grad_norm", optimizer.grad_norm)
    return found.hexdigest()


def _groups(case: DigestCase, device: str) -> Iterator[dict[str, Any]]:
    """The parameter groups of a case; "grad_dtype" is the dtype of a group's gradients."""
    if case.states != "mixed":
        rows = [(case.param_dtype, case.weights, case.states, case.grad_dtype)]
    else:
        names = list(DTYPES)
        rows = [(*stored, names[i % len(names)]) for i, stored in enumerate(STORED)]
    for number, (dtype, weights, states, grad_dtype) in enumerate(rows):
        shapes = LISTS[case.list]
        if case.states == "mixed":  # two parameters per group, whose shapes vary between groups
            shapes = [shapes[number % len(shapes)], (1000 + number,)]
        params = []
        for i, shape in enumerate(shapes):
            value = numbers(shape, DTYPES[dtype], 1000 * number + i)
            params.append(torch.nn.Parameter(_placed(case, value).to(device)))
        yield {
            "params": params,
            "states": states,
            "weights": weights,
            "grad_dtype": DTYPES[grad_dtype],
        }


def _placed(case: DigestCase, value: torch.Tensor) -> torch.Tensor:
    """The value in the memory format of the case's list: contiguous unless it is "strided"."""
    if case.list != "strided":
        return value
    if value.dim() == 4:
        return value.to(memory_format=torch.channels_last)
    return value.t().contiguous().t()


def _set_gradient(
    case: DigestCase, param: torch.Tensor, dtype: torch.dtype, step: int, index: int
) -> None:
    """Sets a new gradient; for a captured graph, writes new values into the existing tensor."""
    value = numbers(tuple(param.shape), dtype, 1_000_000 * (step + 1) + index)
    if case.list == "rows" and value.dim() == 2:
        value[torch.arange(len(value)) % 8 != step % 8] = 0
    if step in case.infinite and index == len(LISTS[case.list]) - 1:
        value.view(-1)[-1] = float("inf")
    value = _placed(case, value).to(param.device)
    if case.graph and param.grad is not None:
        param.grad.copy_(value)
        return
    if dtype != param.dtype:
        param.grad_dtype = None
    param.grad = value


def _captured(optimizer: Any) -> Any:
    """Captures one step in a CUDA graph, without running it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def _add(found: Any, key: str, value: Any) -> None:
    """Adds a value to the digest.

    Args:
        found: the SHA-256 object.
        key: name of the value, which is hashed too.
        value: a tensor, hashed in index order with every NaN replaced by the same one; any other
            value is hashed by its repr().
    """
    if not isinstance(value, torch.Tensor):
        found.update(f"{key} {value!r}".encode())
        return
    plain = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if plain.is_floating_point():
        plain = torch.where(plain.isnan(), torch.full_like(plain, float("nan")), plain)
    found.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())


def line_of(env: Line, case: DigestCase, backend: str, found: str) -> Line:
    """The result line of a digest."""
    settings = {
        "rule": case.optimizer,
        "options": {k: str(v) if v == float("inf") else v for k, v in case.options.items()},
        "states": case.states,
        "weights": case.weights,
        "param_dtype": case.param_dtype,
        "grad_dtype": case.grad_dtype,
        "list": case.list,
        "steps": case.steps,
        "seed": case.seed,
    }
    return {**env, "kind": "digest", "backend": backend, "case": case.name, **settings} | {
        "digest": found
    }


def known(path: Path) -> dict[tuple[str, str], str]:
    """(case, backend) -> digest, from the lines of a file; the last line of a key counts."""
    return {
        (line["case"], line["backend"]): line["digest"]
        for line in results.read_lines(path)
        if line.get("kind") == "digest"
    }


def _there(env: Line, out: Path | None) -> dict[tuple[str, str], str]:
    """(case, backend) -> digest, from the lines of this device and the current sources."""
    found = {}
    for path in {FILE, GPU_FILE, out or FILE}:
        for line in results.read_lines(path):
            if line.get("kind") != "digest" or line["device"] != env["device"]:
                continue
            kernels = line["backend"]
            if line["sources"].get(kernels) == env["sources"].get(kernels):
                found[line["case"], kernels] = line["digest"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Computes digests.

    Returns:
        0 on success; 1 if a case fails, or differs from the reference, or has no reference with
        --check; 2 on wrong usage or if the device or a backend is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.digest",
        description="Compares the results of steps with those of the reference by SHA-256.",
    )
    parser.add_argument(
        "--device", choices=list(DEVICES), default="cpu", help="device to run on (default cpu)"
    )
    parser.add_argument(
        "--backends",
        metavar="NAMES",
        help="backends, separated by commas (default reference,cpu on a CPU, cuda,triton on a GPU)",
    )
    parser.add_argument(
        "--cases", metavar="PATTERN", help="run only the cases whose name contains PATTERN"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed digests of the reference"
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=FILE,
        metavar="FILE",
        help="file with the committed digests (default bench/results/digests.jsonl)",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="skip cases that have a line for this device and the current sources",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append result lines to FILE")
    parser.add_argument("--list", action="store_true", help="print the cases, compute nothing")
    args = parser.parse_args(argv)
    chosen = [c for c in cases() if args.cases is None or fnmatch(c.name, f"*{args.cases}*")]
    if not chosen:
        parser.error(f"--cases: no case matches {args.cases!r}; --list prints the cases")
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if why := DEVICES[args.device].unavailable():
        print(f"bench.digest: {why}", file=sys.stderr)
        return 2
    names = (args.backends or DEFAULT[args.device]).split(",")
    for name in names:
        if name not in BACKENDS:
            parser.error(f"--backends must be among {', '.join(BACKENDS)}; got {name!r}")
        if name == "cuda" and args.device == "cpu":
            _stand_in()
        if why := BACKENDS[name].unavailable(torch.device(args.device)):
            print(f"bench.digest: backend {name}: {why}", file=sys.stderr)
            return 2
    return _run(args, chosen, names)


def _run(args: argparse.Namespace, chosen: list[DigestCase], names: list[str]) -> int:
    env = results.environment(args.device)
    lines = known(args.against).items()
    committed = {case: found for (case, name), found in lines if name == "reference"}
    out = args.out or (None if args.check else FILE)
    there = _there(env, out) if args.missing else {}
    counts = {"equal": 0, "new": 0, "DIFFERS": 0, "FAILED": 0}
    for name in names:
        start = time.perf_counter()
        for case in chosen:
            kept = there.get((case.name, name))
            try:
                found = kept or digest(case, name, args.device)
            except Exception as error:  # continue with the other cases
                found, verdict = f"{type(error).__name__}: {error}", "FAILED"
            else:
                expected = committed.get(case.name, "")
                verdict = "equal" if found == expected else "DIFFERS" if expected else "new"
                if out is not None and kept is None:
                    results.append(out, [line_of(env, case, name, found)])
            counts[verdict] += 1
            if verdict in ("DIFFERS", "FAILED") or (verdict == "new" and args.check):
                print(f"{verdict} {name}: {case.name}: {found}", flush=True)
        spent = time.perf_counter() - start
        print(f"{name} on {env['device']}: {len(chosen)} cases in {spent:.0f} s", flush=True)
    print(
        f"{counts['equal']} equal the committed digests, {counts['DIFFERS']} differ, "
        f"{counts['new']} have none, {counts['FAILED']} failed"
    )
    wrong = counts["DIFFERS"] or counts["FAILED"] or (args.check and counts["new"])
    return int(bool(wrong))


def _stand_in() -> None:
    """Registers the CUDA sources, compiled for the CPU, as the backend "cuda"."""
    shim = importlib.import_module("tests.cuda_shim")
    BACKENDS["cuda"] = shim.ShimBackend()


if __name__ == "__main__":
    sys.exit(main())
