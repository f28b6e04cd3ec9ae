"""Checks that commands with plots make before minutes of work."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from onepass_tools import UsageError


def check_extra() -> None:
    """Raises UsageError unless the packages of the extra "cli" are installed."""
    missing = [n for n in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(n) is None]
    if missing:
        raise UsageError(
            f"missing packages: {', '.join(missing)}; install them with pip install 'onepass[cli]'"
        )


def check_out(out: Path) -> None:
    """Creates the output directory; raises UsageError if it is not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
