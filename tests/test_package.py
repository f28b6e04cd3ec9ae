"""The package: symbols and build of its libraries, and the length of files and functions."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import onepass

ROOT = Path(__file__).parents[1]
PACKAGE = Path(onepass.__file__).parent
LIBRARY = PACKAGE / "libonepass_cpu.so"
FOLDERS = ("csrc", "python", "triton_kernels", "tests", "bench", "examples")
SUFFIXES = {".py", ".h", ".cpp", ".cuh", ".cu", ".sh"}
MAX_LINES = 450  # lines per file; files are cut by concept, so the limit leaves room
MAX_FUNCTION_LINES = 60  # lines per function of the package, docstring included


# --- the library -----------------------------------------------------------------------------


def undefined_symbols(*options: str) -> list[tuple[str, str]]:
    """The undefined dynamic symbols of the CPU library as (type, name)."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built: there was no C++ compiler")
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not on PATH")
    command = ["nm", "-D", "--undefined-only", *options, str(LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(kind, name) for kind, name in (line.split(maxsplit=1) for line in lines)]


def test_library_uses_only_the_stable_abi():
    unstable = re.compile(r"\b(at|c10|caffe2|torch)::")
    names = [name for _, name in undefined_symbols("--demangle")]
    assert any(name.startswith("aoti_torch_") for name in names)  # nm listed the symbols
    assert [name for name in names if unstable.search(name)] == []


def test_library_has_no_python_symbol():
    assert [name for _, name in undefined_symbols() if re.match(r"_?Py", name)] == []


def test_library_uses_only_system_symbols_and_the_c_interface_of_torch():
    # Symbols of the system libraries have a version (memcpy@GLIBC_2.14), those of torch have none.
    # The types w and v mark weak symbols, which may stay undefined.
    others = [name for kind, name in undefined_symbols() if "@" not in name and kind not in "wv"]
    assert [name for name in others if not name.startswith(("aoti_torch_", "torch_"))] == []


# --- the build -------------------------------------------------------------------------------


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py build_ext with no compiler on PATH and these environment variables."""
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    env |= {"PATH": "/nonexistent", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.so"))


def test_build_without_a_compiler_says_so_in_one_line(tmp_path):
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert "only the slow reference backend" in line
    assert libraries(tmp_path) == []
    # All packages below python/: an editable install is then a path, which type checkers read.
    assert (ROOT / "python/onepass/triton_kernels").samefile(ROOT / "triton_kernels")


def test_build_with_a_named_compiler_that_is_missing_fails(tmp_path):
    result = build(tmp_path, CXX="/nonexistent/g++")
    assert result.returncode != 0
    assert "CXX must be a C++ compiler; /nonexistent/g++ is not on PATH" in result.stderr
    assert libraries(tmp_path) == []


def test_build_without_a_toolkit_that_was_asked_for_fails(tmp_path):
    result = build(tmp_path, ONEPASS_CUDA="1", CUDA_HOME="/nonexistent")
    assert result.returncode != 0
    assert "ONEPASS_CUDA=1" in result.stderr
    assert libraries(tmp_path) == []


def test_build_with_an_unknown_choice_of_kernels_fails(tmp_path):
    result = build(tmp_path, ONEPASS_CUDA_KERNELS="some")
    assert result.returncode != 0
    assert "ONEPASS_CUDA_KERNELS must be all or sample; got 'some'" in result.stderr


def test_architectures_of_the_cuda_library():
    code = "import runpy, sys; sys.argv = ['setup.py', '--version']; "
    code += "print(*runpy.run_path('setup.py')['architecture_flags'](sys.stdin.read()))"

    def flags(listed):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, input=listed, capture_output=True, text=True)

    assert "arch=compute_90,code=[sm_90]" in flags("9.0").stdout
    assert "arch=compute_100,code=[sm_100,compute_100]" in flags("8.0;10.0+PTX").stdout
    assert "got 'Hopper' in '9.0 Hopper'" in flags("9.0 Hopper").stderr


# --- the package -----------------------------------------------------------------------------


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_package_needs_torch_and_numpy_alone():
    requires = metadata.requires("onepass") or []
    assert {line for line in requires if "extra ==" not in line} == {"torch>=2.10", "numpy"}


def test_no_source_file_is_too_long():
    files = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    assert ROOT / "setup.py" in files
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_function_is_too_long():
    files = [path for path in PACKAGE.rglob("*.py") if "triton_kernels" not in path.parts]
    lengths = {
        f"{path.relative_to(PACKAGE)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert "engine/plan_builder.py: make_plan" in lengths
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
