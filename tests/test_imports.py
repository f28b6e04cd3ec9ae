"""The modules that importing the package loads, and the layers of its packages."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import onepass

PACKAGE = Path(onepass.__file__).parent
PYTHON = Path(__file__).parents[1] / "python"

# --- layers ---

ROWS = {
    "onepass.rules": 1,
    "onepass.formats": 1,
    "onepass.numerics": 1,
    "onepass.engine": 2,
    "onepass.muon": 3,
    "onepass.paging": 3,
    "onepass.distributed": 3,
    "onepass.optim": 4,
    "onepass.checkpoints": 4,
    "onepass.memory": 5,
    "onepass.training": 5,
    "onepass.integrations": 5,
    "onepass.weight_sync": 5,
    "onepass_tools": 6,
}
"""Package -> layer.

A file imports only from its own and lower layers; other modules are layer 1.
"""

APART = ({"onepass.paging", "onepass.distributed"},)
"""Packages of one layer that must not import each other."""

EXEMPT = {"onepass", "onepass.__main__"}
"""Modules with lazy imports, and the entry point of the command."""


def modules():
    """Module name -> file, for both packages."""
    found = {}
    for name in ("onepass", "onepass_tools"):
        for path in sorted((PYTHON / name).rglob("*.py")):
            parts = path.relative_to(PYTHON).with_suffix("").parts
            if "triton_kernels" not in parts:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def targets(node, module, path):
    """Full names of the modules, or names in modules, that an import statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = []
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = package[: len(package) - node.level + 1]
    base += node.module.split(".") if node.module else []
    return [".".join((*base, alias.name)) for alias in node.names]


def imports(module, path, known):
    """The modules that a file imports anywhere, including imports for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in targets(node, module, path):
            parent = name.rpartition(".")[0]
            found |= {name} & known.keys() or {parent} & known.keys()
    return found - {module}


def package_of(module):
    """The key in ROWS of a module's package."""
    parts = module.split(".")
    return parts[0] if parts[0] == "onepass_tools" else ".".join(parts[:2])


@pytest.fixture(scope="module")
def graph():
    """Module -> the modules that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_every_kind_of_import_is_read(tmp_path, graph):
    path = tmp_path / "plan.py"
    path.write_text(
        "import torch, onepass.rules\n"
        "from . import backends\n"
        "from .device_plan import DevicePlan\n"
        "if TYPE_CHECKING:\n    from ..optim import base, SGD\n"
        "def later():\n    from onepass.paging.options import Paging\n"
    )
    assert imports("onepass.engine.plan", path, graph) == {
        "onepass.rules",
        "onepass.engine.backends",
        "onepass.engine.device_plan",
        "onepass.optim.base",
        "onepass.optim",
        "onepass.paging.options",
    }
    assert {name.split(".")[0] for name in graph} == {"onepass", "onepass_tools"}


def test_no_file_imports_from_a_higher_layer(graph):
    wrong = []
    for module, found in graph.items():
        own = package_of(module)
        for other in (package_of(name) for name in found):
            if module in EXEMPT or other == own or (own, other) == ("onepass_tools", "onepass"):
                continue
            up = ROWS.get(other, 1) > ROWS.get(own, 1) or other in EXEMPT
            if up or any({own, other} == apart for apart in APART):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_imports_have_no_cycles(graph):
    above = {name: set(found) for name, found in graph.items() if name not in EXEMPT}
    # A file that imports none of the remaining files is not part of a cycle.
    while leaves := [name for name, found in above.items() if not found & above.keys()]:
        for name in leaves:
            del above[name]
    # Neither is a file that none of the remaining files imports.
    while roots := above.keys() - set().union(*above.values()):
        for name in roots:
            del above[name]
    assert sorted(above) == []


def test_only_the_command_imports_the_tools():
    known = modules()
    found = set()
    for module, path in known.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {name.split(".")[0] for node in nodes for name in targets(node, module, path)}
        if names & {"onepass_tools", "bench", "tests"} and module.split(".")[0] == "onepass":
            found.add(module)
    assert found == {"onepass.__main__"}


# --- loaded modules ---


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


def test_names_load_on_first_use():
    assert {*onepass.__all__, "__version__"} <= {*dir(onepass)}
    for name in onepass.__all__:
        value = getattr(onepass, name)
        assert name in vars(onepass)  # found without __getattr__ from now on
        if isinstance(value, type):
            assert pickle.loads(pickle.dumps(value)) is value
    namespace = {}
    exec("from onepass import *", namespace)
    assert {*onepass.__all__} <= namespace.keys()
    assert onepass.paging.Paging
    assert onepass.__version__


@pytest.mark.parametrize("name", ["Adamw", "nothing", "_private", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name):
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
