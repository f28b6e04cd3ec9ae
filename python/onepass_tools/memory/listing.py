"""`onepass memory --list-models` and `--list-optimizers`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from onepass_tools.memory.table import print_lines, print_rows

if TYPE_CHECKING:
    from onepass.memory.peers import Peer


def run(args: argparse.Namespace) -> int:
    """Print the requested lists; return 0."""
    from onepass.memory.models import KNOWN
    from onepass.memory.peers import PEERS
    from onepass.memory.variants import WORDS
    from onepass.optim.registry import classes

    if args.list_models:
        rows = [(name, f"{row.parameters:,}", row.source) for name, row in KNOWN.items()]
        print_rows([("model", "parameters", "source"), *rows], left=(0, 2))
    if args.list_models and args.list_optimizers:
        print()
    if args.list_optimizers:
        ours = [(name, f"onepass.{made.__name__}", "") for name, made in classes().items()]
        peers = [(name, p.made.library.module, _note(p)) for name, p in PEERS.items()]
        print_rows([("optimizer", "of", "note"), *ours, *peers], left=(0, 1, 2))
        print_lines(["", f"options, to be added with a plus: {', '.join(WORDS)}"])
    return 0


def _note(peer: Peer) -> str:
    import torch

    why = peer.unavailable("cuda" if torch.cuda.is_available() else "cpu")
    return f"not available: {why}" if why else ""
