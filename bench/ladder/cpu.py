"""The ladders of the CPU.

One goes from torch's loop over the tensors to one call on all threads. The other goes from separate
passes over the whole tensor to a kernel that decodes, updates and encodes in registers.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onepass
from onepass.engine import libraries
from onepass_tools.benchmark.cases import OPTIONS
from onepass_tools.benchmark.param_lists import ParamList

from .rungs import Rung

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
# The same flags as in setup.py, so that the bits are the same.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
ISA_FLAGS = {
    "plain": [],
    "avx2": ["-mavx2"],
    "avx512": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    + ["-mprefer-vector-width=512"],
}
UNIT = 65536
TILES = {
    "passes over the whole tensor: decode, rule, encode": 1 << 62,
    "tiles of 65,536 elements, in L2": 65536,
    "tiles of 256 elements, in L1": 256,
    "no tiles: decoded, updated and encoded in registers": 0,
}
THREADS = torch.get_num_threads()  # before a rung changes it


def isas() -> list[str]:
    """The instruction sets that this machine and build support, the narrowest first."""
    found = []
    kept = libraries.cpu_isa()
    for name in ISA_FLAGS:
        try:
            libraries.cpu_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    libraries.cpu_isa(kept)
    return found


def _use(threads: int, isa: str) -> None:
    """Sets the number of threads and the instruction set."""
    torch.set_num_threads(threads)
    libraries.cpu_isa(isa)


def list_rungs(params: ParamList) -> list[Rung]:
    """The rungs of AdamW in fp32 over a list, from torch's loop to onepass."""
    weights = params.normal(0.02, torch.float32, 1)
    grads = params.normal(0.01, torch.float32, 2)

    def of(make: Callable[[list[torch.Tensor]], Any]) -> tuple[list[torch.Tensor], Any]:
        own = [torch.nn.Parameter(weight.clone()) for weight in weights]
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad
        return list(own), make(list(own))

    options = OPTIONS["adamw"]
    theirs, torchs = of(lambda p: torch.optim.AdamW(p, **options))
    each, many = of(lambda p: [onepass.AdamW([x], **options, backend="cpu") for x in p])
    whole, ours = of(lambda p: onepass.AdamW(p, **options, backend="cpu"))

    def foreach(on: bool) -> None:
        _use(THREADS, "auto")
        torchs.param_groups[0]["foreach"] = on

    def step_each() -> None:
        for optimizer in many:
            optimizer.step()

    narrowest, *wider = isas()
    rungs = [
        Rung("torch, a loop over the tensors", torchs.step, theirs, partial(foreach, False), False),
        Rung("torch, foreach", torchs.step, theirs, partial(foreach, True), False),
        Rung(
            f"one pass: a call for each tensor, one thread, {narrowest}",
            step_each,
            each,
            partial(_use, 1, narrowest),
        ),
        Rung("one call for the list", ours.step, whole, partial(_use, 1, narrowest)),
        Rung(f"{THREADS} threads", ours.step, whole, partial(_use, THREADS, narrowest)),
    ]
    for isa in wider:
        rungs.append(Rung(isa, ours.step, whole, partial(_use, THREADS, isa)))
    return rungs


def restore() -> None:
    """Sets the threads and the instruction set back to those that onepass selects."""
    _use(THREADS, os.environ.get("ONEPASS_CPU_ISA") or "auto")


def tile_rungs(numel: int) -> list[Rung]:
    """The rungs of AdamW all in bf16 over one tensor; they differ in the size of the tiles.

    Raises:
        RuntimeError: g++ is not installed, or numel is not a multiple of 65,536.
    """
    step = _library().onepass_ladder_step
    isa = isas()[-1].encode()
    options = OPTIONS["adamw"]
    beta1, beta2 = options["betas"]
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(2)).mul_(0.01).bfloat16()

    def rung(name: str, tile: int) -> Rung:
        param, states, taken = weight.clone(), torch.zeros(2, numel, dtype=torch.bfloat16), [0]

        def run() -> None:
            taken[0] += 1
            root = math.sqrt(1 - beta2 ** taken[0])
            row = np.array(
                [
                    1.0,
                    options["lr"] * root / (1 - beta1 ** taken[0]),
                    options["lr"] * options["weight_decay"],
                    beta1,
                    1 - beta1,
                    beta2,
                    1 - beta2,
                    options["eps"] * root,
                ],
                dtype=np.float32,
            )
            tensors = (param, grad, states[0], states[1])
            at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            numbers = (ctypes.c_int64(0), ctypes.c_int64(taken[0]))
            size = ctypes.c_int64(numel)
            at_row = ctypes.c_void_p(row.ctypes.data)
            if step(isa, ctypes.c_int64(tile), THREADS, size, *at, at_row, *numbers):
                raise RuntimeError(f"numel must be a multiple of {UNIT}; got {numel}")

        return Rung(name, run, [param])

    return [rung(name, tile) for name, tile in TILES.items()]


@cache
def _library() -> ctypes.CDLL:
    """tiles.cpp compiled with the kernels of onepass; rebuilt only if a source has changed."""
    if not shutil.which("g++"):
        raise RuntimeError("building tiles.cpp needs g++, which is not on PATH")
    here = Path(__file__).parent
    key = hashlib.sha256(repr((FLAGS, ISA_FLAGS)).encode())
    for path in sorted([*CPU.parent.rglob("*.h"), *CPU.glob("kernels_*.cpp"), here / "tiles.cpp"]):
        key.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "onepass-ladder")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"tiles-{key.hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            jobs: list[tuple[Path, list[str]]] = [(here / "tiles.cpp", [])]
            jobs += [(CPU / f"kernels_{isa}.cpp", flags) for isa, flags in ISA_FLAGS.items()]

            def compile_one(job: tuple[Path, list[str]]) -> str:
                source, flags = job
                target = f"{made}/{source.stem}.o"
                command = ["g++", *FLAGS, *flags, "-c", str(source), "-o", target]
                subprocess.run(command, check=True)
                return target

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, jobs))
            linked = f"{made}/{library.name}"
            subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", linked], check=True)
            os.replace(linked, library)
    return ctypes.CDLL(str(library))
