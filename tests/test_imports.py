"""What importing the package loads, and which of its parts import which."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import onepass

PACKAGE = Path(onepass.__file__).parent


def imported(path):
    """The modules that a file of onepass imports, those for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def test_only_the_command_imports_the_tools():
    files = [p for p in PACKAGE.rglob("*.py") if "triton_kernels" not in p.parts]
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if any(name.split(".")[0] in ("onepass_tools", "bench", "tests") for name in imported(path))
    }
    assert found == {"__main__.py"}


@pytest.mark.parametrize("arguments", ["--help", "--version", "bench --help", "memory --help"])
def test_help_does_not_load_torch(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['onepass', *{arguments.split()!r}]\n"
        "try:\n    runpy.run_module('onepass', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_there_when_they_are_used():
    assert {*onepass.__all__, "__version__"} <= {*dir(onepass)}
    for name in onepass.__all__:
        value = getattr(onepass, name)
        assert name in vars(onepass)  # the second use finds it at once
        if isinstance(value, type):
            assert pickle.loads(pickle.dumps(value)) is value
    namespace = {}
    exec("from onepass import *", namespace)
    assert {*onepass.__all__} <= namespace.keys()
    assert onepass.paging.Paging
    assert onepass.__version__


@pytest.mark.parametrize("name", ["Adamw", "nothing", "_private", "__wrapped__"])
def test_a_name_that_is_not_there(name):
    with pytest.raises(AttributeError, match=f"module 'onepass' has no attribute '{name}'"):
        getattr(onepass, name)


def test_a_module_that_needs_a_missing_package_says_which(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import onepass\n"
        "try:\n    onepass.AdamW\n"
        "except ImportError as error:\n    assert 'numpy' in str(error), error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
