"""Compares the plain CPU kernels built for aarch64 with those built for this machine.

    python -m tests.aarch64_check [folder for the builds, default build/aarch64]

The script compiles ``csrc/cpu/kernels_plain.cpp`` and ``tests/aarch64_driver.cpp`` for both
processors with the flags of setup.py, runs the aarch64 program with qemu-aarch64, and compares the
bytes that every format, rule and fused kernel writes; two NaNs count as equal. It then checks the
machine code for prefetches and for the absence of fused multiply-adds. The driver checks that
``DefaultRounding`` keeps denormals. The exit status is 1 if anything differs and 2 if a program is
missing. ``make test`` does not run this script.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .support.machine_code import LINES, PREFETCH, disassembly, prefetches

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/cpu/kernels_plain.cpp", "tests/aarch64_driver.cpp")
# Program -> the Debian package that contains it.
PACKAGES = {
    "g++": "g++",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
# Element type of a record -> its NumPy type, and the magnitude bits of infinity, which those of a
# NaN exceed.
TYPES = {
    "f8": ("u8", 0x7FF0000000000000),
    "f4": ("u4", 0x7F800000),
    "bf16": ("u2", 0x7F80),
    "f2": ("u2", 0x7C00),
}
FUSED_MULTIPLY_ADD = re.compile(r"\t(fn?madd|fn?msub|fmla|fmls)\t")

Record = tuple[str, str, bytes]


def setup_flags() -> list[str]:
    """FLAGS of setup.py. Running setup.py also writes csrc/generated."""
    argv, sys.argv = sys.argv, ["setup.py", "--version"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return runpy.run_path(str(ROOT / "setup.py"))["FLAGS"]
    finally:
        sys.argv = argv


def compile_all(folder: Path) -> None:
    """Compiles every source for both processors and links ``native`` and ``aarch64``."""
    flags = setup_flags()
    compilers = {
        "aarch64": ["aarch64-linux-gnu-g++", *flags],
        "native": ["g++", *flags, "-DONEPASS_X86"],
    }

    def compile_one(target: str, source: str) -> str:
        output = str(folder / f"{target}-{Path(source).stem}.o")
        subprocess.run([*compilers[target], "-c", source, "-o", output], cwd=ROOT, check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            target: [pool.submit(compile_one, target, source) for source in SOURCES]
            for target in compilers
        }
        for target, compiled in objects.items():
            # With static linking, qemu needs no folder of aarch64 libraries.
            command = [compilers[target][0], "-static", *(done.result() for done in compiled)]
            subprocess.run([*command, "-o", str(folder / target)], check=True)


def records(path: Path) -> Iterator[Record]:
    """Reads the name, element type and bytes of each record that the driver wrote."""
    with path.open("rb") as file:
        while line := file.readline():
            name, kind, size = line.decode().split()
            yield name, kind, file.read(int(size))


def elements(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The bits of each element, with the same bits for every NaN, and which elements are NaN."""
    _, kind, data = record
    dtype, infinity = TYPES.get(kind, (kind, 0))
    bits = np.frombuffer(data, dtype)
    if kind not in TYPES:
        return bits, np.zeros(bits.shape, bool)
    nan = (bits & np.array((1 << bits.itemsize * 8 - 1) - 1, dtype)) > np.array(infinity, dtype)
    return np.where(nan, np.array(infinity + 1, dtype), bits), nan


def differences(pair: tuple[Record, Record], codes: tuple[Record, Record]) -> int:
    """The number of elements that differ.

    Args:
        pair: the records to compare.
        codes: the records before them, which for companions hold the codes of the weights.
    """
    (found, _), (expected, _) = elements(pair[0]), elements(pair[1])
    differ = found != expected
    if pair[0][0].endswith(".extra") and codes[0][1] in TYPES:
        differ = differ & ~(elements(codes[0])[1] & elements(codes[1])[1])
    return int(differ.sum())


def compare(aarch64: Path, native: Path) -> int:
    """Prints a line for each group of records; returns the number of records that differ."""
    functions: dict[str, set[str]] = {}
    compared, sizes, nans, wrong = Counter[str](), Counter[str](), Counter[str](), 0
    before: tuple[Record, Record] | None = None
    inputs: set[str] = set()
    for pair in zip(records(aarch64), records(native), strict=True):
        (name, kind, found), (other, other_kind, expected) = pair
        if (name, kind, len(found)) != (other, other_kind, len(expected)):
            raise ValueError(f"aarch64 wrote {name} where this machine wrote {other}")
        group, function, _, size, _ = name.split("/")
        functions.setdefault(group, set()).add(function)
        inputs.add(size)
        compared[group] += 1
        sizes[group] += len(found)
        if found != expected:
            count = differences(pair, before or pair)
            nans[group] += not count
            wrong += bool(count)
            if count and wrong <= 20:
                print(f"DIFFERENT: {name}: {count} elements")
        before = pair
    print(f"compared at sizes {', '.join(sorted(inputs, key=int))}:")
    for group, names in functions.items():
        print(
            f"{group}: {len(names)} functions, {sizes[group]} bytes in {compared[group]} outputs, "
            f"{nans[group]} of which differ only in NaN payloads"
        )
    print(f"{wrong} of {compared.total()} outputs differ")
    return wrong


def check_code(path: Path) -> int:
    """Prints the prefetches in the aarch64 object; returns the number of failed checks."""
    instruction, copies = PREFETCH["aarch64"]
    lines = disassembly(path, "aarch64-linux-gnu-objdump")
    found, wrong = prefetches(lines, instruction), 0
    print(f"{sum(instruction in line for line in lines)} {instruction} in all")
    for formats, least in LINES.items():
        print(f"{instruction} in AdamW of {formats}: {found[formats]}, at least {least} needed")
        wrong += len(found[formats]) != copies or min(found[formats]) < least
    fused = sum(bool(FUSED_MULTIPLY_ADD.search(line)) for line in lines)
    print(f"{fused} fused multiply-adds")
    return wrong + bool(fused)


def main() -> int:
    if os.uname().machine != "x86_64":
        print("aarch64_check: compares with x86-64, and this machine is " + os.uname().machine)
        return 2
    missing = sorted({package for name, package in PACKAGES.items() if not shutil.which(name)})
    if missing:
        print(f"aarch64_check: missing Debian packages: apt-get install {' '.join(missing)}")
        return 2
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "aarch64").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    compile_all(folder)
    wrong = 0
    for target, emulator in (("aarch64", ["qemu-aarch64"]), ("native", [])):
        with (folder / f"{target}.out").open("wb") as file:
            failed = subprocess.run([*emulator, folder / target], stdout=file).returncode != 0
        print(f"{target}: DefaultRounding {'FAILS' if failed else 'keeps denormals'}")
        wrong += failed
    wrong += compare(folder / "aarch64.out", folder / "native.out")
    wrong += check_code(folder / "aarch64-kernels_plain.o")
    print("FAILED" if wrong else "passed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
