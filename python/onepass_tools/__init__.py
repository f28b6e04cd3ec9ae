"""The command line: `onepass <command>` or `python -m onepass <command>`.

Each command is a module with two functions, `add_arguments(parser)` and `run(args) -> int`. Only
the module of the requested command is imported, and it imports slow packages in `run`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from typing import NamedTuple

from onepass.suggestions import did_you_mean

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Command(NamedTuple):
    """A subcommand: its name, one line of help, and the module that implements it."""

    name: str
    help: str
    module: str


COMMANDS = (
    Command("bench", "time an optimizer step, also of other libraries", "onepass_tools.bench"),
    Command("compare", "plot the algorithms on surfaces and models", "onepass_tools.compare"),
    Command("demo", "train a small text model with several optimizers", "onepass_tools.demo"),
    Command("info", "print versions, backends and the support matrix", "onepass_tools.info"),
    Command("memory", "predict the training memory of each optimizer", "onepass_tools.memory"),
)


class UsageError(Exception):
    """A usage error; `main` prints it as one line on stderr and returns exit code 2."""


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parse(argv: list[str]) -> tuple[argparse.Namespace | None, int]:
    """Parse `argv`; return (arguments, 0), or (None, exit code) if there is no command to run."""
    parser = argparse.ArgumentParser(
        prog="onepass", description="Optimizers whose step is one pass over memory."
    )
    version = package_version("onepass") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"onepass {version}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", title="commands")

    # Top-level options take no values, so the first word without a dash is the command.
    typed = next((word for word in argv if not word.startswith("-")), None)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        if command.name == typed:
            importlib.import_module(command.module).add_arguments(sub)

    names = [command.name for command in COMMANDS]
    try:
        if typed is not None and typed not in names:
            meant = did_you_mean(typed, names)
            listed = ", ".join(names)
            parser.error(
                f"argument command: invalid choice: {typed!r} (choose from {listed}){meant}"
            )
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse exits, but main() must return a number
        return None, int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return None, EXIT_USAGE
    return args, 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    Args:
        argv: the command line without the program name; None for `sys.argv[1:]`.

    Returns:
        0 for success, 1 if the command finished and reports a failure, 2 for wrong usage, 130 after
        an interrupt, 141 if the reader closed the output pipe.
    """
    try:
        args, code = _parse(sys.argv[1:] if argv is None else argv)
        if args is not None:
            module = next(command.module for command in COMMANDS if command.name == args.command)
            code = int(importlib.import_module(module).run(args))
        # Flush here, so that a closed pipe raises BrokenPipeError inside this try block.
        sys.stdout.flush()
    except UsageError as error:
        print(f"onepass: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("onepass: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit; redirect that flush to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code
