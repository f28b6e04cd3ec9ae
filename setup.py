"""Builds csrc/ into shared libraries against the LibTorch stable ABI: for the CPU, and for CUDA.

They hold no Python symbol and only stable torch symbols, so one build serves every torch >= 2.10
and every CPython >= 3.10: the wheel is tagged py3-none-<platform>.

ONEPASS_CUDA=0 leaves the CUDA library out, ONEPASS_CUDA=1 makes a missing toolkit an error; unset,
a toolkit is used if there is one. Whether there is a GPU plays no part. ONEPASS_CUDA_ARCH, else
TORCH_CUDA_ARCH_LIST, names the architectures: "9.0", or "8.0;9.0;10.0+PTX", the default.

ONEPASS_CUDA_DEFINES="ONEPASS_TUNING ONEPASS_THREADS=256" defines these macros and builds the CUDA
library alone: a variant of csrc/cuda/tuning.h, as `python -m bench.tuning --build` does.

ONEPASS_SANITIZE=1 builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, as
`make sanitize` does: such a library loads only into a process that preloads their run times.
"""

import os
import platform
import re
import runpy
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
# -O1 overrides the -O3 before it and changes no result. The checks that are left out look at every
# address before it is used, as AddressSanitizer does: with them the vector kernels take g++ 12 more
# than four minutes each, and without them one.
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
]
# -mtune: by default GCC builds gathers, which dynamic8's map needs, out of single loads.
X86_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mtune=haswell"],
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        "-mtune=skylake-avx512",
        # GCC's: constants come from memory, and not through the unit that permutes.
        "-mtune-ctrl=^inter_unit_moves_to_vec",
    ],
}


CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    # The numerics contract: no fused multiply-add. Roots and divisions are correctly rounded and
    # denormals kept unless --use_fast_math says otherwise.
    "--fmad=false",
    # csrc/formats has constexpr functions that kernels call with constants.
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
    "-DUSE_CUDA",  # torch's header then declares the C function for the current stream
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
]
CUDA_LIBRARY = "onepass.libonepass_cuda"
CUDA_SECONDS = {"sweep_adam": 4, "sweep_rmsprop": 3, "sweep_sgd": 2, "sweep_lion": 2}
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_DEFINES = [f"-D{name}" for name in os.environ.get("ONEPASS_CUDA_DEFINES", "").split()]


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if set (it must exist), else the first of the usual names."""
    asked = os.environ.get("CXX")
    if asked:
        if not shutil.which(asked.split()[0]):
            sys.exit(f"onepass: CXX={asked}: no such compiler")
        return asked
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def takes_flag(compiler: str, flag: str) -> bool:
    """Only GCC has -mtune-ctrl; any other flag has to be known."""
    if not flag.startswith("-mtune-ctrl"):
        return True
    command = [compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_nvcc() -> tuple[str | None, str]:
    """(nvcc, why there is none): of CUDA_HOME if that is set, else the first on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return (str(nvcc), "") if nvcc.exists() else (None, f"CUDA_HOME={home} has no bin/nvcc")
    found = shutil.which("nvcc")
    return found, "" if found else "there is no nvcc on PATH, and CUDA_HOME is not set"


def architecture_flags(listed: str) -> list[str]:
    """nvcc's flags for a list like "8.0;9.0+PTX", separated by semicolons, commas or spaces."""
    flags = []
    for name in listed.replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            sys.exit(f'onepass: no architecture {name!r} in {listed!r}; write "9.0" or "9.0+PTX"')
        number = match[1] + match[2]
        codes = [f"sm_{number}", f"compute_{number}"] if match[3] else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    return flags


class BuildLibrary(build_ext):
    """Compiles every source with the flags of its instruction set and links them; the two libraries
    side by side, for each has a few files that take longest."""

    # Variants are built side by side, each by one thread.
    compiling = ThreadPoolExecutor(1 if CUDA_DEFINES else os.cpu_count())

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or 2

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA_LIBRARY:
            self.build_cuda(ext)
        elif not CUDA_DEFINES:
            self.build_cpu(ext)

    def objects(self, sources: list[Path]) -> list[Path]:
        found = [Path(self.build_temp, *s.with_suffix(s.suffix + ".o").parts) for s in sources]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
        return found

    def build_cpu(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            print("onepass: no C++ compiler found: only the slow reference backend is installed")
            return
        torch_root = find_torch()
        sanitize = SANITIZE_FLAGS if os.environ.get("ONEPASS_SANITIZE") == "1" else []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = [*FLAGS, *sanitize, f"-isystem{torch_root / 'include'}"]
        if x86:
            flags.append("-DONEPASS_X86")
        sources = [Path(s) for s in ext.sources if x86 or Path(s).name not in X86_FLAGS]
        objects = self.objects(sources)

        def compile_one(source: Path, target: Path) -> None:
            extra = [f for f in X86_FLAGS.get(source.name, []) if takes_flag(compiler, f)]
            call([compiler, *flags, *extra, "-c", str(source), "-o", str(target)])

        list(self.compiling.map(compile_one, sources, objects))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, *sanitize, "-shared", *map(str, objects), "-o", str(output)]
        link += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        # torch loads its libraries before ours; a run path would only record where this one was.
        call(link)

    def build_cuda(self, ext: Extension) -> None:
        wanted = os.environ.get("ONEPASS_CUDA", "")
        compiler = find_compiler()
        nvcc, missing = find_nvcc()
        if wanted == "0":
            missing = "ONEPASS_CUDA=0"
        elif compiler is None:
            missing = "there is no C++ compiler"
        if missing:
            if wanted == "1":
                sys.exit(f"onepass: ONEPASS_CUDA=1, but there can be no CUDA library: {missing}")
            if compiler is not None:  # the other library has said so
                print(f"onepass: the CUDA library is left out: {missing}")
            return
        assert compiler is not None
        assert nvcc is not None
        torch_root = find_torch()
        listed = os.environ.get("ONEPASS_CUDA_ARCH") or os.environ.get("TORCH_CUDA_ARCH_LIST")
        host = [nvcc, f"-ccbin={compiler}", *CUDA_DEFINES]
        device = [*CUDA_FLAGS, *architecture_flags(listed or CUDA_ARCHITECTURES)]
        include = f"-isystem={torch_root / 'include'}"
        # The slowest first, so that the last to end are short.
        sources = sorted(map(Path, ext.sources), key=lambda s: -CUDA_SECONDS.get(s.stem, 0))
        objects = self.objects(sources)

        def compile_one(source: Path, target: Path) -> None:
            # Kernels do not see torch's headers, which nvcc takes long over.
            flags = device if source.suffix == ".cu" else [*CUDA_FLAGS, include]
            call([*host, *flags, "-c", str(source), "-o", str(target)])

        list(self.compiling.map(compile_one, sources, objects))
        # A torch without CUDA lacks the library with the current stream's function. Ours is linked
        # against an empty one of that name, and finds the real one that torch has loaded.
        stub = Path(self.build_temp, "libtorch_cuda.so")
        soname = f"-Wl,-soname,{stub.name}"
        call([compiler, "-shared", "-xc++", os.devnull, soname, "-o", str(stub)])
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*host, "-shared", "-cudart=static", *map(str, objects), "-o", str(output)]
        link += ["-Xlinker=-s"] * bool(CUDA_DEFINES)  # many variants travel together
        link += [f"-L{stub.parent}", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
        call([*link, f"-L{torch_root / 'lib'}", "-ltorch_cpu"])


def find_torch() -> Path:
    """The folder of the torch that is built against."""
    try:
        import torch
    except ImportError:
        sys.exit(
            "onepass: the build needs the torch it will run with: install torch first, then "
            "pip install --no-build-isolation onepass"
        )
    return Path(torch.__file__).parent


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


runpy.run_path(str(ROOT / "csrc" / "generate.py"))["write"]()


def sources(cuda: bool) -> list[str]:
    """The files of one library: those in a folder named cuda are the CUDA library's; only
    csrc/ops.cpp, with the schemas, cannot be in both."""
    files = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    return sorted(str(p) for p in files if ("cuda" in p.parts) == cuda)


setup(
    # Here and not in pyproject.toml, which cannot add a package to those it finds.
    packages=[*find_packages("python"), "onepass.triton_kernels"],
    package_dir={"": "python", "onepass.triton_kernels": "triton_kernels"},
    # Optional: without a compiler there is no file to copy.
    ext_modules=[
        Extension("onepass.libonepass_cpu", sources(cuda=False), optional=True),
        Extension(CUDA_LIBRARY, sources(cuda=True), optional=True),
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    distclass=BinaryDistribution,
)
