"""Builds csrc/ into two shared libraries, for the CPU and for CUDA, on LibTorch's stable ABI.

The libraries use no Python symbols and only stable torch symbols, so one build works with every
torch >= 2.10 and every CPython >= 3.10. The wheel is therefore tagged py3-none-<platform>.

The CUDA library is built if there is a CUDA toolkit, whether or not there is a GPU. ONEPASS_CUDA=0
skips it; ONEPASS_CUDA=1 makes a missing toolkit an error. ONEPASS_CUDA_ARCH, or else
TORCH_CUDA_ARCH_LIST, lists the architectures, for example "9.0". The default is
"8.0;9.0;10.0+PTX".

ONEPASS_CUDA_KERNELS=sample compiles only the CUDA kernels whose machine code the tests read, in a
third of the time. A GPU does not run such a library; the default is "all".

ONEPASS_CUDA_DEFINES="ONEPASS_TUNING ONEPASS_THREADS=256" builds only the CUDA library, with these
macros defined: a variant of csrc/cuda/tuning.h, for `python -m bench.tuning --build`.

ONEPASS_SANITIZE=1 builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, for
`make sanitize`. This library loads only into a process that preloads the sanitizers' run times.
"""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = 2 << 56 | 10 << 48  # torch 2.10, the first whose stable ABI has all that csrc/ uses

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-fopenmp-simd",
    # The numerics contract: no fused multiply-add. The other two flags change no value; they allow
    # the compiler to vectorise square roots and selections.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
]
# -O1 overrides the -O3 before it and changes no result. The disabled checks test every address
# before its use, which AddressSanitizer does as well. With these checks, g++ 12 takes more than
# four minutes instead of one for each file of vector kernels.
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
]
# -mtune: by default, GCC replaces gathers, which dynamic8 needs, by single loads. For AVX2, the
# instruction order that GCC chooses for Skylake is the fastest, on AMD Zen 3 too (docs/cpu.md).
X86_FLAGS = {
    "kernels_avx2.cpp": [
        "-mavx2",
        "-mtune=skylake-avx512",
        # GCC also orders instructions before it assigns registers, which hides more latency.
        "-fschedule-insns",
        "-fsched-pressure",
    ],
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        "-mtune=skylake-avx512",
        # GCC only: loads constants from memory instead of through the shuffle port.
        "-mtune-ctrl=^inter_unit_moves_to_vec",
    ],
}


CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    # The numerics contract: no fused multiply-add. Without --use_fast_math, square roots and
    # divisions are correctly rounded, and denormals are kept.
    "--fmad=false",
    # Kernels call constexpr functions of csrc/formats.
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
    "-DUSE_CUDA",  # makes torch's header declare the C function for the current stream
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
]
CUDA_LIBRARY = "onepass.libonepass_cuda"
# The files that take longest to compile, and the first to start, so that no core is idle while the
# last one compiles.
LONGEST = (
    "sweep_adam",
    "sweep_rmsprop",
    "kernels_avx512",
    "kernels_avx2",
    "kernels_plain",
    "sweep_lion",
    "sweep_sgd",
)
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_KERNELS = os.environ.get("ONEPASS_CUDA_KERNELS") or "all"
CUDA_DEFINES = [f"-D{name}" for name in os.environ.get("ONEPASS_CUDA_DEFINES", "").split()]


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if it is set, else the first of g++, c++ and clang++ on PATH.

    Exits with an error if $CXX does not exist.
    """
    asked = os.environ.get("CXX")
    if asked:
        if not shutil.which(asked.split()[0]):
            sys.exit(f"onepass: CXX must be a C++ compiler; {asked} is not on PATH")
        return asked
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def takes_flag(compiler: str, flag: str) -> bool:
    """Whether the compiler accepts a flag; only tested for flags that only GCC has."""
    if not flag.startswith(("-mtune-ctrl", "-fsched")):
        return True
    command = [compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_nvcc() -> tuple[str | None, str]:
    """Finds nvcc: that of CUDA_HOME if it is set, else the first on PATH.

    Returns:
        (path or None, the reason for None).
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return (str(nvcc), "") if nvcc.exists() else (None, f"CUDA_HOME={home} has no bin/nvcc")
    found = shutil.which("nvcc")
    return found, "" if found else "nvcc is not on PATH, and CUDA_HOME is not set"


def architecture_flags(listed: str) -> list[str]:
    """The flags of nvcc for a list of architectures such as "8.0;9.0+PTX".

    Args:
        listed: the architectures, separated by semicolons, commas or spaces.
    """
    flags = []
    for name in listed.replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            sys.exit(
                "onepass: ONEPASS_CUDA_ARCH or TORCH_CUDA_ARCH_LIST must list architectures such "
                f"as 9.0 or 9.0+PTX; got {name!r} in {listed!r}"
            )
        number = match[1] + match[2]
        codes = [f"sm_{number}", f"compute_{number}"] if match[3] else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    return flags


@dataclass(frozen=True)
class Plan:
    """The calls that compile the source files of a library, and the calls that link it."""

    compiles: dict[Path, list[str]]
    links: list[list[str]]


class BuildLibrary(build_ext):
    """Compiles the files of both libraries in one pool, the longest first, and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file name of a library, without the tag of the Python version."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        """Builds both libraries."""
        plans = [plan for ext in self.extensions if (plan := self.plan(ext))]
        compiles = {source: call for plan in plans for source, call in plan.compiles.items()}
        turn = {name: i for i, name in enumerate(LONGEST)}
        sources = sorted(compiles, key=lambda source: turn.get(source.stem, len(turn)))
        # Variants of bench.tuning are built in parallel, so each of them uses one thread.
        with ThreadPoolExecutor(1 if CUDA_DEFINES else os.cpu_count()) as pool:
            list(pool.map(call, [compiles[source] for source in sources]))
        for plan in plans:
            for link in plan.links:
                call(link)

    def plan(self, ext: Extension) -> Plan | None:
        """The compiler calls of a library; None, after a message, if the library is not built."""
        if ext.name == CUDA_LIBRARY:
            return self.plan_cuda(ext)
        return None if CUDA_DEFINES else self.plan_cpu(ext)

    def objects(self, sources: list[Path]) -> list[Path]:
        """Paths of the object files of the sources; creates their folders."""
        found = [Path(self.build_temp, *s.with_suffix(s.suffix + ".o").parts) for s in sources]
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
        return found

    def output(self, ext: Extension) -> str:
        """The path of a library; creates its folder."""
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def plan_cpu(self, ext: Extension) -> Plan | None:
        """The compiler calls of the CPU library; None if there is no C++ compiler."""
        compiler = find_compiler()
        if compiler is None:
            print(
                "onepass: no C++ compiler found (g++, c++ or clang++): only the slow reference "
                "backend is installed"
            )
            return None
        torch_root = find_torch()
        sanitize = SANITIZE_FLAGS if os.environ.get("ONEPASS_SANITIZE") == "1" else []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = [*FLAGS, *sanitize, f"-isystem{torch_root / 'include'}"]
        if x86:
            flags.append("-DONEPASS_X86")
        sources = [Path(s) for s in ext.sources if x86 or Path(s).name not in X86_FLAGS]
        objects = self.objects(sources)

        def compile_one(source: Path, target: Path) -> list[str]:
            extra = [f for f in X86_FLAGS.get(source.name, []) if takes_flag(compiler, f)]
            return [compiler, *flags, *extra, "-c", str(source), "-o", str(target)]

        link = [compiler, *sanitize, "-shared", *map(str, objects), "-o", self.output(ext)]
        # No run path: torch loads its libraries before this one, and a run path would only record
        # the location of torch on this machine.
        link += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        return Plan(dict(zip(sources, map(compile_one, sources, objects), strict=True)), [link])

    def plan_cuda(self, ext: Extension) -> Plan | None:
        """The compiler calls of the CUDA library; None without a toolkit, unless ONEPASS_CUDA=1."""
        wanted = os.environ.get("ONEPASS_CUDA", "")
        if CUDA_KERNELS not in ("all", "sample"):
            sys.exit(f"onepass: ONEPASS_CUDA_KERNELS must be all or sample; got {CUDA_KERNELS!r}")
        compiler = find_compiler()
        nvcc, missing = find_nvcc()
        if wanted == "0":
            missing = "ONEPASS_CUDA=0"
        elif compiler is None:
            missing = "no C++ compiler found"
        if missing:
            if wanted == "1":
                sys.exit(
                    f"onepass: ONEPASS_CUDA=1, but the CUDA library cannot be built: {missing}"
                )
            if compiler is not None:  # otherwise plan_cpu prints a message
                print(f"onepass: the CUDA library is not built: {missing}")
            return None
        assert compiler is not None
        assert nvcc is not None
        torch_root = find_torch()
        listed = os.environ.get("ONEPASS_CUDA_ARCH") or os.environ.get("TORCH_CUDA_ARCH_LIST")
        host = [nvcc, f"-ccbin={compiler}", *CUDA_DEFINES]
        host += ["-DONEPASS_SAMPLE_KERNELS"] * (CUDA_KERNELS == "sample")
        device = [*CUDA_FLAGS, *architecture_flags(listed or CUDA_ARCHITECTURES)]
        include = f"-isystem={torch_root / 'include'}"
        sources = [Path(s) for s in ext.sources]
        objects = self.objects(sources)

        def compile_one(source: Path, target: Path) -> list[str]:
            # Kernels do not include torch's headers, which nvcc compiles slowly.
            flags = device if source.suffix == ".cu" else [*CUDA_FLAGS, include]
            return [*host, *flags, "-c", str(source), "-o", str(target)]

        # The installed torch may lack libtorch_cuda.so, which has the function for the current
        # stream. Link with an empty library of this name; at run time the loader uses the real one,
        # which torch has loaded.
        stub = Path(self.build_temp, "libtorch_cuda.so")
        soname = f"-Wl,-soname,{stub.name}"
        make_stub = [compiler, "-shared", "-xc++", os.devnull, soname, "-o", str(stub)]
        link = [*host, "-shared", "-cudart=static", *map(str, objects), "-o", self.output(ext)]
        link += ["-Xlinker=-s"] * bool(CUDA_DEFINES)  # small files, because there are many variants
        link += [f"-L{stub.parent}", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
        link += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        compiles = dict(zip(sources, map(compile_one, sources, objects), strict=True))
        return Plan(compiles, [make_stub, link])


def find_torch() -> Path:
    """The folder of the installed torch; exits with an error if torch is not installed.

    torch is not imported, because that takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "onepass: the build needs torch: install torch first, then run pip install "
            "--no-build-isolation onepass"
        )
    return Path(spec.origin).parent


def call(command: list[str]) -> None:
    """Runs a command of the compiler; exits with an error if it fails."""
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("onepass: this command failed: " + " ".join(command))


class Wheel(bdist_wheel):
    """A wheel that is tagged by platform only, because the libraries do not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """A distribution that always counts as platform-specific."""

    def has_ext_modules(self) -> bool:
        """True, also if no library is built."""
        return True


runpy.run_path(str(ROOT / "csrc" / "generate.py"))["write"]()


def sources(cuda: bool) -> list[str]:
    """The source files of one library, relative to the root.

    Args:
        cuda: True for the CUDA library, which has the files in folders named cuda; False for the
            CPU library, which has all others. csrc/ops.cpp defines the schemas of both.
    """
    files = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    return sorted(str(p) for p in files if ("cuda" in p.parts) == cuda)


def link_kernels() -> None:
    """Makes triton_kernels/ a package of onepass, by a symbolic link in python/onepass.

    If all packages are below python/, an editable install is a path, which type checkers read.
    Otherwise it is an import hook, which they do not.
    """
    link = ROOT / "python" / "onepass" / "triton_kernels"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "..", "triton_kernels"), target_is_directory=True)


link_kernels()
setup(
    packages=find_packages("python"),  # follows the link
    package_dir={"": "python"},
    # Optional, because no library is built without a compiler.
    ext_modules=[
        Extension("onepass.libonepass_cpu", sources(cuda=False), optional=True),
        Extension(CUDA_LIBRARY, sources(cuda=True), optional=True),
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    distclass=BinaryDistribution,
)
