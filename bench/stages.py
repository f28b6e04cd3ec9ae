"""What is worth doing with a borrowed GPU: numbered stages, the most valuable first.

Each part of a stage is one command, in which ``{out}`` stands for the file of result lines. The
command of a dry run does the same on a CPU, on tiny sizes.
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
        shows: what it is evidence of, for docs/gpu.md.
        seconds: after which it is killed; about twice what it is expected to take.
        command: of the shell.
        dry: the command of a dry run.
        needs: the backends whose sources its evidence is of; it is left out where that of the
            present sources is there already.
    """

    name: str
    shows: str
    seconds: int
    command: str
    dry: str
    needs: tuple[str, ...] = CUDA


@dataclass(frozen=True)
class Stage:
    """Parts that fit a call of five minutes."""

    number: int
    name: str
    parts: tuple[Part, ...]


def _tests(name: str, shows: str, seconds: int, files: str, needs: tuple[str, ...] = CUDA) -> Part:
    """A part that runs tests; without a GPU each is skipped, or runs on the CPU."""
    return Part(name, shows, seconds, f"tests {files}", f"tests {files} --maxfail 1", needs)


def _tool(name: str, shows: str, seconds: int, command: str) -> Part:
    """A part that is a tool of the CUDA toolkit; it says so where that is not here."""
    return Part(name, shows, seconds, command, command)


_QUICK = "--providers 'onepass-cpu,torch-fused' --cases 300x1 --quick --samples 2"

STAGES = (
    Stage(
        1,
        "bits",
        (
            Part(
                "digests",
                "the bits of 179 steps in CUDA",
                60,
                "python -m bench.digest --device cuda --backends cuda --check --missing "
                "--out {out}",
                "python -m bench.digest --check --backends cpu --cases SGD --out {out}",
            ),
            _tests("paging-tests", "paged states", 150, "tests/test_paging_gpu.py"),
            _tests("cuda-tests", "every rule and format, streams", 150, "tests/test_cuda_gpu.py"),
            _tests("step-tests", "clipping, scaling, graphs", 60, "tests/test_cuda_gpu_step.py"),
        ),
    ),
    Stage(
        2,
        "features",
        (
            _tests(
                "graph-tests",
                "captured steps of Triton",
                150,
                "tests/test_triton_graph.py",
                ("triton",),
            ),
            _tests(
                "feature-tests",
                "averages, telemetry, release_gradients, torch.compile, FSDP2 with NCCL",
                200,
                "tests/test_gpu_*.py -m gpu",
                BOTH,
            ),
            Part(
                "phase",
                "unscale, clip, step and zero against torch",
                40,
                "python -m bench.phase --device cuda --numel 500000000 --out {out}",
                "python -m bench.phase --numel 100000 --samples 2 --out {out}",
            ),
            _tool("memcheck", "no access out of bounds", 60, "sanitize memcheck"),
            _tool("racecheck", "no race", 60, "sanitize racecheck"),
        ),
    ),
    Stage(
        3,
        "speed",
        (
            Part(
                "bench",
                "each case, beside torch",
                200,
                "python -m bench --device cuda --missing --out {out} "
                "--providers 'onepass-cuda,torch-fused*,torch-foreach'",
                f"python -m bench --missing --out {{out}} {_QUICK}",
            ),
            _tool("counters", "what bounds the kernels", 60, "counters"),
            Part(
                "paging",
                "the link's bandwidth in paged steps",
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
                "launch shape, chunk and prefetch for five formats",
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
                "GPT-2 of 124 M: loss, tokens a second, memory",
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
                "bitsandbytes, torchao, FlashOptim, apex, TransformerEngine",
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
                "triton-digests",
                "the bits of 179 steps in Triton, which compiles long",
                290,
                "python -m bench.digest --device cuda --backends triton --check --missing "
                "--out {out}",
                "python -m bench.digest --check --missing --backends cpu --cases SGD --out {out}",
                ("triton",),
            ),
            _tests(
                "triton-tests",
                "every rule and format in Triton",
                290,
                "tests/test_triton_gpu.py",
                ("triton",),
            ),
        ),
    ),
    Stage(
        8,
        "rest",
        (
            _tool("quick", "the kernels' roots and quotients, exhaustively", 90, "quick"),
            Part(
                "sizes",
                "time against size",
                80,
                "python -m bench.sizes --device cuda --out {out}",
                "python -m bench.sizes --most 10000 --samples 1 --out {out}",
            ),
            Part(
                "share",
                "the optimizer's part of a training step",
                60,
                "python -m bench.share --device cuda --out {out}",
                "python -m bench.share --quick --samples 1 --out {out}",
            ),
            Part(
                "ladder",
                "what each step of the kernels' making gained",
                120,
                "python -m bench.ladder --device cuda --out {out}",
                "python -m bench.ladder --help",
            ),
        ),
    ),
)
