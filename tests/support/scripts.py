"""Runs a script or a command in a new process in which torch is imported already."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .processes import forked


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
    return _run([str(path)], folder, threads)


def run_command(*arguments: str, stderr: str = "") -> Result:
    """Runs `onepass` with arguments and waits for its end.

    Args:
        arguments: the command line.
        stderr: path of a terminal that is the standard error; by default, a file is.
    """
    return _run(["onepass", *arguments], Path.cwd(), 2, stderr)


def _run(argv: list[str], folder: Path, threads: int, stderr: str = "") -> Result:
    with tempfile.TemporaryDirectory() as written:
        outputs = [Path(written, name) for name in ("stdout", "stderr")]
        files = [str(outputs[0]), stderr or str(outputs[1])]
        process = forked().Process(target=_main, args=(argv, folder, threads, files))
        process.start()
        process.join()
        found = (output.read_text() if output.exists() else "" for output in outputs)
        return Result(process.exitcode, *found)


def _main(argv: list[str], folder: Path, threads: int, outputs: list[str]) -> None:
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), descriptor)
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    sys.argv = argv
    import torch

    torch.set_num_threads(threads)
    if argv[0] == "onepass":
        runpy.run_module("onepass", run_name="__main__")
    else:
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
