"""Builds the variants of :mod:`bench.tuning` in parallel, each with its own call of setup.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onepass.engine import libraries

from . import results
from .tuning_variants import Variant, architecture, library_of, source_hash

NAME = re.compile(r"\d+x\d+-\d+K(-[a-z0-9-]+)?-[0-9a-f]{12}\.so")
Compile = Callable[[Variant, Path], str]
"""(variant, file to write) -> error message, or "" on success."""


def compile_variant(variant: Variant, target: Path) -> str:
    """Compiles a variant with setup.py and its flags.

    Args:
        variant: the variant.
        target: the library to write.

    Returns:
        The error message, or "" on success.
    """
    settings = {
        "ONEPASS_CUDA": "1",
        "ONEPASS_CUDA_ARCH": architecture(),
        "ONEPASS_CUDA_DEFINES": variant.defines,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "--quiet", "build_ext"]
        command += ["--build-lib", folder, "--build-temp", f"{folder}/objects"]
        done = subprocess.run(
            command,
            cwd=results.ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        made = Path(folder, "onepass", "libonepass_cuda.so")
        if done.returncode or not made.exists():
            return done.stdout[-4000:] or (
                f"setup.py ended with exit status {done.returncode} and wrote no library"
            )
        part = target.with_suffix(".part")
        shutil.move(made, part)
        os.replace(part, target)
    return ""


def copy_cpu_library(variant: Variant, target: Path) -> str:
    """Copies the CPU library in place of a variant, for a dry run; see :func:`compile_variant`."""
    if libraries.missing:
        return libraries.missing
    shutil.copyfile(libraries.LIBRARY, target)
    return ""


def build(variants: Sequence[Variant], folder: Path, compile_one: Compile) -> int:
    """Builds the missing variants and deletes those of other sources.

    Args:
        variants: all variants.
        folder: folder of the libraries.
        compile_one: :func:`compile_variant` or :func:`copy_cpu_library`.

    Returns:
        The number of variants whose build failed.
    """
    # Absolute: setup.py runs in the root of the repository.
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    built_of, start = source_hash(), time.perf_counter()
    kept = {library_of(v, folder, built_of).name for v in variants}
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    wanted = [v for v in variants if not library_of(v, folder, built_of).exists()]

    def one(variant: Variant) -> bool:
        why = compile_one(variant, library_of(variant, folder, built_of))
        print(f"{variant.name}: {'FAILED: ' + why if why else 'built'}", flush=True)
        return bool(why)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = sum(pool.map(one, wanted))
    print(
        f"{len(wanted) - failed} built, {failed} failed, {len(variants) - len(wanted)} up to date, "
        f"in {time.perf_counter() - start:.0f} s; sources {built_of}"
    )
    return failed
