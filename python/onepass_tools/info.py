"""`onepass info`: print the installed versions, the available backends and their support."""

from __future__ import annotations

import argparse
import platform
import sys

from onepass_tools import package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass info`."""
    parser.add_argument(
        "--markdown", action="store_true", help="print only the support matrix, as Markdown"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, with colour only on a terminal; return 0."""
    from onepass.engine import backends

    matrix = backends.support_matrix().strip()
    if args.markdown:
        print(matrix)
        return 0
    status = [(name, _one_line(reason)) for name, reason in backends.status()]
    if sys.stdout.isatty() and package_version("rich"):
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
