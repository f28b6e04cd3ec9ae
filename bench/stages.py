"""The stages of ``bench/gpu.sh``: tests and benchmarks for a GPU, the most important first.

Each part of a stage is one command, in which ``{out}`` stands for the file of result lines. The
command of a dry run does the same on a CPU with tiny sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

BOTH = ("cuda", "triton")
CUDA = ("cuda",)


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: unique among all parts.
        shows: what the part tests or measures, for docs/gpu.md.
        seconds: time limit, about twice the expected time.
        command: the shell command.
        dry: the shell command of a dry run.
        needs: the backends that the part tests. The part is skipped if it has passed with their
            current sources.
    """

    name: str
    shows: str
    seconds: int
    command: str
    dry: str
    needs: tuple[str, ...] = CUDA


@dataclass(frozen=True)
class Stage:
    """A group of parts."""

    number: int
    name: str
    parts: tuple[Part, ...]


def _tests(name: str, shows: str, seconds: int, files: str, needs: tuple[str, ...] = CUDA) -> Part:
    """A part that runs tests; without a GPU, the tests are skipped or run on the CPU."""
    return Part(name, shows, seconds, f"tests {files}", f"tests {files} --maxfail 1", needs)


def _tool(name: str, shows: str, seconds: int, command: str) -> Part:
    """A part that runs a tool of the CUDA toolkit; its result is "not here" without the tool."""
    return Part(name, shows, seconds, command, command)


# The suite that runs on every target: hyperparameters, the parts of a sweep, whole steps.
_STEP = "tests/test_prologue.py tests/test_sweep_extras.py tests/test_step.py"
# The formats of the targets, on the large list.
_FORMATS = ",".join(
    f"adamw/{weights}/states-{states}/llama*"
    for weights, states in (
        ("fp32", "fp32"),
        ("bf16-split16", "bf16"),
        ("bf16-split16", "mx8"),
        ("bf16-split8", "mx8"),
        ("bf16-stochastic", "mx4"),
    )
)
_QUICK = "--providers 'onepass-cpu,torch-fused' --cases 300x1 --quick --samples 2"

STAGES = (
    Stage(
        1,
        "bits",
        (
            Part(
                "digests",
                "digests of steps with the CUDA kernels",
                60,
                "python -m bench.digest --device cuda --backends cuda --check --missing "
                "--out {out}",
                "python -m bench.digest --check --backends cpu --cases SGD --out {out}",
            ),
            _tests("paging-tests", "paged states", 150, "tests/test_paging_gpu.py"),
            _tests(
                "cuda-tests",
                "all rules and formats; streams",
                150,
                "tests/test_bits.py tests/test_cuda_gpu.py -k 'cuda-gpu or test_cuda_gpu'",
            ),
            _tests(
                "step-tests",
                "clipping, loss scaling, CUDA graphs",
                60,
                f"{_STEP} tests/test_cuda_gpu_step.py -k 'cuda-gpu or test_cuda_gpu'",
            ),
        ),
    ),
    Stage(
        2,
        "features",
        (
            _tests(
                "graph-tests",
                "CUDA graphs of steps with the Triton kernels",
                150,
                "tests/test_triton_graph.py",
                ("triton",),
            ),
            _tests(
                "feature-tests",
                "averaged weights, telemetry, release_gradients, torch.compile, FSDP2 with NCCL",
                200,
                "tests/test_gpu_*.py -m gpu",
                BOTH,
            ),
            Part(
                "phase",
                "time to unscale, clip, step and zero, compared with torch",
                40,
                "python -m bench.phase --device cuda --numel 500000000 --out {out}",
                "python -m bench.phase --numel 100000 --samples 2 --out {out}",
            ),
            _tool(
                "memcheck", "out-of-bounds accesses (compute-sanitizer)", 60, "sanitize memcheck"
            ),
            _tool("racecheck", "data races (compute-sanitizer)", 60, "sanitize racecheck"),
        ),
    ),
    Stage(
        3,
        "speed",
        (
            Part(
                "bench",
                "time of each benchmark case, compared with torch",
                200,
                "python -m bench --device cuda --missing --out {out} "
                "--providers 'onepass-cuda,torch-fused*,torch-foreach'",
                f"python -m bench --missing --out {{out}} {_QUICK}",
            ),
            Part(
                "muon",
                "time of Muon on the matrices of Llama-3-8B/16 and on 126 small ones, compared "
                "with torch",
                90,
                "python -m bench.muon --device cuda --list llama3-8b/16 --out {out} && "
                "python -m bench.muon --device cuda --list 126x64 --out {out}",
                "python -m bench.muon --list tiny --samples 1 --out {out}",
                BOTH,
            ),
            _tool("counters", "hardware counters of the kernels (ncu)", 60, "counters"),
            Part(
                "weight-sync",
                "the cost of recording and taking the changed weights",
                60,
                "python -m bench.weight_sync --device cuda --numel 500000000 --out {out}",
                "python -m bench.weight_sync --numel 20000 --samples 2 --settings bf16 --out {out}",
                BOTH,
            ),
            Part(
                "paging",
                "paged steps, compared with the bandwidth of the link",
                150,
                "python -m bench.paging --out {out}",
                "python -m bench.paging --quick --samples 1",
            ),
        ),
    ),
    Stage(
        4,
        "tuning",
        (
            Part(
                "tuning",
                "launch shape, chunk length, taper, prefetch and ring for five formats",
                280,
                "python -m bench.tuning --device cuda --out {out}",
                "python -m bench.tuning --dry --out {out}",
            ),
        ),
    ),
    Stage(
        5,
        "training",
        (
            Part(
                "pretrain",
                "GPT-2 124 M: loss, tokens per second, memory",
                290,
                "python -m bench.pretrain --device cuda --seconds 50 --out {out}",
                "python -m bench.pretrain --quick --out {out}",
            ),
        ),
    ),
    Stage(
        6,
        "peers",
        (
            Part(
                "peers",
                "time of bitsandbytes, torchao, FlashOptim, apex, TransformerEngine",
                290,
                "peers && python -m bench --device cuda --missing --out {out}",
                f"python -m bench --missing --out {{out}} {_QUICK}",
            ),
        ),
    ),
    Stage(
        7,
        "triton",
        (
            Part(
                "triton-bench",
                "time of five formats with the Triton kernels",
                120,
                "python -m bench --device cuda --missing --out {out} --providers onepass-triton "
                f"--cases '{_FORMATS}'",
                f"python -m bench --missing --out {{out}} {_QUICK}",
                ("triton",),
            ),
            Part(
                "triton-digests",
                "digests of steps with the Triton kernels; most of the time is compilation",
                290,
                "python -m bench.digest --device cuda --backends triton --check --missing "
                "--out {out}",
                "python -m bench.digest --check --missing --backends cpu --cases SGD --out {out}",
                ("triton",),
            ),
            _tests(
                "triton-tests",
                "all rules and formats with the Triton kernels",
                290,
                f"tests/test_bits.py {_STEP} tests/test_triton_gpu.py "
                "-k 'triton-gpu or test_triton_gpu'",
                ("triton",),
            ),
        ),
    ),
    Stage(
        8,
        "rest",
        (
            _tool("quick", "square roots and quotients of the kernels, exhaustively", 90, "quick"),
            Part(
                "sizes",
                "time of a step against its size",
                80,
                "python -m bench.sizes --device cuda --out {out}",
                "python -m bench.sizes --most 10000 --samples 1 --out {out}",
            ),
            Part(
                "share",
                "the optimizer's share of a training step",
                60,
                "python -m bench.share --device cuda --out {out}",
                "python -m bench.share --quick --samples 1 --out {out}",
            ),
            Part(
                "ladder",
                "the gain of each optimization of the kernels",
                120,
                "python -m bench.ladder --device cuda --out {out}",
                "python -m bench.ladder --help",
            ),
        ),
    ),
)
