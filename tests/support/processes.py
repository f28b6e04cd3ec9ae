"""Starts processes in which torch and onepass are imported already.

Importing torch and all that optimizers and FSDP need takes about seven seconds of a processor,
which is longer than most tests run. A server imports them once for all tests of a pytest process;
the processes are forks of the server.
"""

from __future__ import annotations

import multiprocessing
from typing import Any


def forked() -> Any:
    """The multiprocessing context whose processes are forks of the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context
