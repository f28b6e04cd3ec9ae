"""The sources that a result was measured with: hashes of kernels and library, and the commit.

The hash of a source ignores comments, docstrings and formatting, so that a result stays valid if
only those have changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ORIGIN = ROOT / "build" / "origin.json"
"""The commit and the file hashes of a checkout, for a copy of it without git. ``python -m
bench.sources`` writes this file; copy it with the checkout."""

_SHARED = ("csrc/*.*", "csrc/rules/*", "csrc/formats/*", "python/onepass/rules/limits.py")
KERNELS = {
    "cpu": (*_SHARED, "csrc/cpu/*", "csrc/cpu/simd/*"),
    "cuda": (*_SHARED, "csrc/cuda/*"),
    "triton": ("triton_kernels/*.py",),
}
"""Backend -> the source files of its kernels."""

_C_PART = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<space>\s+)""",
    re.DOTALL,
)


@cache
def kernel_hashes() -> dict[str, str]:
    """Backend -> hash of the sources of its kernels, ignoring comments and formatting."""
    found = {}
    for backend, patterns in KERNELS.items():
        whole = hashlib.sha256()
        for path in sorted({p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()}):
            whole.update(f"{path.relative_to(ROOT)}\n{essence(path)}\n".encode())
        found[backend] = whole.hexdigest()[:16]
    return found


def essence(path: Path) -> str:
    """The text of a source file without comments, docstrings and formatting."""
    text = path.read_text(encoding="utf-8")
    return _python(text) if path.suffix == ".py" else _c(text)


def _c(text: str) -> str:
    """C++ without comments, with white space only between words and at the end of directives."""

    def shortened(match: re.Match[str]) -> str:
        return match["string"] or " "

    lines = []
    for line in text.replace("\\\n", " ").split("\n"):
        lines.append(f"\0{line}\0" if line.lstrip().startswith("#") else line)
    plain = _C_PART.sub(shortened, "\n".join(lines))
    plain = re.sub(r" *(?:\0 *)+", "\n", plain)
    return re.sub(r"(?<![\w\n]) +| +(?![\w\n])", "", plain)


def _python(text: str) -> str:
    """Python without docstrings, printed from its syntax tree."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def library_hash(path: Path) -> str | None:
    """Hash of a built library; None if the file does not exist."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The commit, and whether files differ from it.

    A copy without git reads them from ORIGIN; without this file both are None.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        return commit, bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs"))
    if not ORIGIN.exists():
        return None, None
    origin = json.loads(ORIGIN.read_text(encoding="utf-8"))
    now = _file_hashes(origin["files"])
    return origin["commit"], bool(origin["dirty"]) or now != origin["files"]


def write_origin(path: Path = ORIGIN) -> None:
    """Writes the commit and the file hashes of this checkout, for a copy without git.

    Raises:
        RuntimeError: this checkout is not a git repository.
    """
    commit = _git("rev-parse", "HEAD")
    listed = _git("ls-files", "--", ".", ":!bench/results", ":!docs")
    if commit is None or listed is None:
        raise RuntimeError(f"{ROOT} is not a git repository")
    origin: dict[str, Any] = {"commit": commit, "dirty": commit_and_dirty()[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(origin | {"files": _file_hashes(listed.splitlines())}))


def _file_hashes(names: Iterable[str]) -> dict[str, str | None]:
    return {name: library_hash(ROOT / name) for name in names}


def _git(*arguments: str) -> str | None:
    """The output of a git command; None if it fails, for example without a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    """Prints the hashes and writes build/origin.json; returns 1 without a git repository."""
    argparse.ArgumentParser(
        prog="python -m bench.sources",
        description="Prints the hashes of the kernels' sources and writes build/origin.json.",
    ).parse_args(argv)
    for backend, found in kernel_hashes().items():
        print(f"{backend:<8} {found}")
    try:
        write_origin()
    except RuntimeError as error:
        print(f"bench.sources: {error}", file=sys.stderr)
        return 1
    print(f"wrote {ORIGIN.relative_to(ROOT)}: include it in a copy of this checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
