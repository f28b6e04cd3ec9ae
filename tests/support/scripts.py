"""Runs a script as the main program of a new process in which torch is imported already.

Importing torch and the first optimizer take about four seconds, longer than most scripts run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PRELOADED = ["torch", "torch._dynamo", "onepass.optim"]


@dataclass(frozen=True)
class Result:
    """What a script left: its exit status, standard output and standard error."""

    returncode: int | None
    stdout: str
    stderr: str


def run_script(path: Path, folder: Path, threads: int) -> Result:
    """Runs a script and waits for its end.

    Args:
        path: the script.
        folder: the working directory of the process.
        threads: the number of threads of torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as written:
        outputs = [Path(written, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(path, folder, threads, outputs))
        process.start()
        process.join()
        return Result(process.exitcode, *(output.read_text() for output in outputs))


def _run(path: Path, folder: Path, threads: int, outputs: list[Path]) -> None:
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    import torch

    torch.set_num_threads(threads)
    runpy.run_path(str(path), run_name="__main__")
