"""The order of the test files, and the fixtures of tests/support/fixtures.py."""

from __future__ import annotations

import os

import pytest

# Two workers with two threads each share the cores of a small machine. By default, OpenMP's threads
# spin while they wait, which takes as much time as the tests themselves. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Workers of pytest-xdist have the width of the terminal in COLUMNS, for which tables are made
# narrower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures, and torch with them, unless workers of pytest-xdist run the tests.

    The workers start after this function, which would import torch for three seconds.
    """
    starts_workers = config.getoption("dist", "no") != "no" and not config.option.collectonly
    if hasattr(config, "workerinput") or not starts_workers:
        config.pluginmanager.import_plugin("tests.support.fixtures")


# The slowest files. The two workers of `make test` take files in this order as they become free. A
# slow file that started last would leave one worker idle.
SLOWEST = (
    "test_bits",
    "test_zero",
    "test_triton_compile",
    "test_format_tracking",
    "test_step",
    "test_memory_cli",
    "test_cuda_code",
    "test_sweep_extras",
    "test_prologue",
    "test_compile",
    "test_whole_steps",
    "test_readme",
    "test_training_study",
    "test_muon_ranks",
    "test_random_ranks",
    "test_change_record",
    "test_cli",
    "test_ambient",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the slowest files first and the others in their usual order.

    Without a GPU, each test that needs one is skipped once instead of once per row: 1,600 skipped
    rows would take 10 s.
    """
    import torch

    turn = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))
    if torch.cuda.is_available():
        return
    shown: set[str] = set()
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        again = item.get_closest_marker("gpu") is not None and test in shown
        shown |= {test} if item.get_closest_marker("gpu") else set()
        (left_out if again else chosen).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen
