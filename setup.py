"""Builds csrc/ into one shared library against the LibTorch stable ABI.

The library holds no Python symbol and only stable torch symbols, so one build serves every
torch >= 2.10 and every CPython >= 3.10: the wheel is tagged py3-none-<platform>.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = 2 << 56 | 10 << 48  # torch 2.10: the oldest whose stable ABI has what csrc/ uses

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-fopenmp-simd",
    # The numerics contract: no fused multiply-add. The other two only allow vectorisation of
    # roots and selections; they change no value.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
]
X86_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2"],
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
}


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if set (it must exist), else the first of the usual names."""
    asked = os.environ.get("CXX")
    if asked:
        if not shutil.which(asked.split()[0]):
            sys.exit(f"onepass: CXX={asked}: no such compiler")
        return asked
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


class BuildLibrary(build_ext):
    """Compiles every source with the flags of its instruction set and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            print("onepass: no C++ compiler found: only the slow reference backend is installed")
            return
        try:
            import torch
        except ImportError:
            sys.exit(
                "onepass: the build needs the torch it will run with: install torch first, then "
                "pip install --no-build-isolation onepass"
            )
        torch_root = Path(torch.__file__).parent
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = [*FLAGS, f"-isystem{torch_root / 'include'}"]
        if x86:
            flags.append("-DONEPASS_X86")
        sources = [Path(s) for s in ext.sources if x86 or Path(s).name not in X86_FLAGS]
        objects = [Path(self.build_temp, *s.with_suffix(".o").parts) for s in sources]

        def compile_one(source: Path, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            extra = X86_FLAGS.get(source.name, [])
            call([compiler, *flags, *extra, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", *map(str, objects), "-o", str(output)]
        link += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        # torch loads its libraries before ours; a run path would only record where this one was.
        call(link)


def call(command: list[str]) -> None:
    """Runs one compiler call; its own message is the best one there is when it fails."""
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("onepass: this command failed: " + " ".join(command))


class Wheel(bdist_wheel):
    """Tags the wheel by platform only: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


def sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))


setup(
    # Here and not in pyproject.toml, which cannot add a package to those it finds.
    packages=[*find_packages("python"), "onepass.triton_kernels"],
    package_dir={"": "python", "onepass.triton_kernels": "triton_kernels"},
    # Optional: without a compiler there is no file to copy.
    ext_modules=[Extension("onepass.libonepass_cpu", sources(), optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    distclass=BinaryDistribution,
)
