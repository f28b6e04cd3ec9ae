"""`onepass info`: print the installed versions, the available backends and their support."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator

from onepass_tools import package_version

WIDE = 100
"""Columns from which the support matrix is a table; below, it is a list."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass info`."""
    parser.add_argument(
        "--markdown", action="store_true", help="print only the support matrix, as Markdown"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, with colour only on a terminal; return 0.

    It fits the width of the terminal, or that of the variable COLUMNS; a pipe gets whole lines.
    """
    from onepass.engine import backends

    matrix = backends.support_matrix().strip()
    if args.markdown:
        print(matrix)
        return 0
    status = [(name, _one_line(reason)) for name, reason in backends.status()]
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns if fits else None
    if width is not None and width < WIDE:
        _print_narrow(_facts(), status, matrix, width)
    elif sys.stdout.isatty() and package_version("rich"):
        _print_rich(_facts(), status, matrix)
    else:
        _print_plain(_facts(), status, matrix)
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _facts() -> list[tuple[str, str]]:
    """Return (name, value) pairs: versions, instruction set, GPUs."""
    import torch

    from onepass.engine import libraries
    from onepass_tools.device_names import device_name

    try:
        isa = libraries.cpu_isa()
    except RuntimeError as error:
        isa = f"none ({_one_line(str(error))})"
    facts = [
        ("onepass", package_version("onepass") or "not installed"),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("numpy", package_version("numpy") or "not installed"),
        ("triton", package_version("triton") or "not installed"),
        ("cpu instructions", isa),
        ("cpu threads", str(torch.get_num_threads())),
    ]
    for index in range(torch.cuda.device_count()):
        facts.append((f"gpu {index}", device_name(torch.device("cuda", index))))
    return facts


def _print_plain(facts: list[tuple[str, str]], status: list[tuple[str, str]], matrix: str) -> None:
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    print("\nbackends")
    width = max((len(name) for name, _ in status), default=0)
    for name, reason in status:
        print(f"  {name:<{width}}  {'not available: ' + reason if reason else 'available'}")
    print(f"\nsupport matrix\n\n{matrix}")


def _print_narrow(
    facts: list[tuple[str, str]], status: list[tuple[str, str]], matrix: str, width: int
) -> None:
    """Prints everything as lists whose lines are at most ``width`` columns long."""

    def wrapped(name: str, value: str, indent: str = "") -> None:
        further = indent + "    "
        print(textwrap.fill(f"{indent}{name}: {value}", width, subsequent_indent=further))

    for name, value in facts:
        wrapped(name, value)
    print("\nbackends")
    for name, reason in status:
        wrapped(name, f"not available: {reason}" if reason else "available", "  ")
    print("\nsupport")
    for rule, cells in _rules(matrix):
        print(f"  {rule}")
        for name, value in cells:
            wrapped(name, value, "    ")


def _rules(matrix: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The rows of the support matrix: (rule, its cells as pairs of column and text)."""
    table = [line.strip("| ").split(" | ") for line in matrix.replace("`", "").splitlines()]
    head, backends = table[0][1:4], table[0][4:]
    for row in table[2:]:
        serving = [name for name, cell in zip(backends, row[4:], strict=True) if cell == "yes"]
        yield row[0], [*zip(head, row[1:4], strict=True), ("backends", ", ".join(serving))]


def _print_rich(facts: list[tuple[str, str]], status: list[tuple[str, str]], matrix: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table
    from rich.text import Text

    console = Console()
    versions = Table.grid(padding=(0, 2))
    for name, value in facts:
        versions.add_row(Text(name, style="bold"), Text(value))
    console.print(versions)

    console.print("\n[bold]backends[/bold]")
    available = Table.grid(padding=(0, 2))
    for name, reason in status:
        state = Text(f"not available: {reason}", "yellow") if reason else Text("available", "green")
        available.add_row(Text(f"  {name}"), state)
    console.print(available)
    console.print("\n[bold]support matrix[/bold]")
    console.print(Markdown(matrix))
