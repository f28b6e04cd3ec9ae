"""The machine code in the built CUDA library, as printed by cuobjdump and nvdisasm."""

from __future__ import annotations

import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import onepass

from .support.thorough import THOROUGH

LIBRARY = onepass.ops.CUDA_LIBRARY
FORMATS = ("fp32", "bf16", "fp16", "bf16sr", "fp16sr", "mx8", "mx4", "dynamic8", "kahan-bf16")
FORMATS += ("kahan-fp16", "master-bf16", "master-fp16", "split16", "split8")
# A label in the output of nvdisasm, and the address of the instruction after it.
LABEL = r"^(\.L_x_\d+):(?:\n[^/\n]*)*\n\s+/\*([0-9a-f]{4,})"


@dataclass
class Kernel:
    """One kernel for one architecture: its name in onepass, resources and instructions.

    The instructions of a kernel that :func:`is_read` leaves out are empty.
    """

    name: str
    arch: str
    resources: dict[str, int]
    instructions: list[str] = field(default_factory=list)

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(opcode(line) for line in self.instructions)


def main_path(kernel: Kernel) -> list[str]:
    """The instructions of one round of a sweep kernel whose warp passes the vote of the fast path.

    A round handles eight elements per thread. The path has every instruction from the head of the
    loop to the vote, those that a predicate or a short branch skips included, except those that
    refill a stage of a ring (:func:`refill`). From the vote, it is the shortest way to the end of
    the loop that writes the new codes: the way without optional work, because optional work runs
    between the vote and the writes.
    """
    branches, vote = branches_of(kernel), _vote(kernel)
    loops = [(to, i) for i, to in branches.items() if to < vote < i]
    # On sm_80, a loop ends with a branch that has no predicate.
    ends = [(to, i) for to, i in loops if kernel.instructions[i].startswith("@")]
    head, end = min(ends or loops)
    skipped = set(refill(kernel, head))
    places = [i for i in range(head, vote + 1) if i not in skipped]
    way = writing_way(kernel, vote + 1, end, _writes_data)
    return [kernel.instructions[i] for i in (*places, *way)]


def refill(kernel: Kernel, head: int) -> range:
    """The places of the instructions that refill a stage of a ring in the loop that starts at head.

    They are the longest part with a bulk copy that one branch skips; empty without a ring.
    """
    vote = _vote(kernel)
    copies = [i for i, op in enumerate(map(opcode, kernel.instructions)) if op.startswith("UBLKCP")]
    around = [
        range(i + 1, to)
        for i, to in branches_of(kernel).items()
        if head < i < to < vote and any(i < copy < to for copy in copies)
    ]
    return max(around, key=len, default=range(0))


def first_use(path: list[str]) -> int:
    """The place of the first instruction that reads a register that a load from global memory
    wrote."""
    loaded: set[int] = set()
    for place, line in enumerate(path):
        operands = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
        if opcode(line).startswith("LDG"):
            width = re.search(r"\.(64|128|256)$", opcode(line))
            words = int(width[1] if width else 32) // 32
            # A load of 256 bits names the registers of its upper half first.
            for first in operands[: max(words // 4, 1)]:
                loaded.update(range(first, first + min(words, 4)))
        elif loaded.intersection(operands):
            return place
    raise AssertionError("no instruction reads what a load wrote")


def branches_of(kernel: Kernel) -> dict[int, int]:
    """Place of a branch -> place that it jumps to; an instruction has 16 bytes."""
    return {
        i: int(match[1], 16) // 16
        for i, line in enumerate(kernel.instructions)
        if (match := re.search(r"\bBRA(?:\.\w+)* (?:!?\w+, )?(0x[0-9a-f]+)", line))
    }


def _writes_data(line: str) -> bool:
    """Whether an instruction writes 16 bytes or more per thread that are not zeros."""
    return is_wide(line, "STG") and not line.endswith(", RZ")


def writing_way(
    kernel: Kernel, start: int, end: int, writing: Callable[[str], bool]
) -> tuple[int, ...]:
    """The places on the shortest way from one instruction to another that passes an instruction
    for which writing is true. A subroutine that is called in any case is not on it."""
    branches, seen = branches_of(kernel), set()
    ways: list[tuple[int, bool, tuple[int, ...]]] = [(1, False, (start,))]
    while ways:
        length, writes, way = heapq.heappop(ways)
        place, line = way[-1], kernel.instructions[way[-1]]
        writes = writes or writing(line)
        if place == end and writes:
            return way
        if place == end or (place, writes) in seen or line.startswith("CALL"):
            continue
        seen.add((place, writes))
        # A predicate is before the opcode, or one more after it. BRA.DIV has a condition too.
        conditional = line.startswith("@") or re.match(r"BRA(\.\w+)* !?U?P|BRA\.DIV", line)
        target = branches.get(place)
        ends = opcode(line) == "EXIT" and not conditional
        nexts = [] if ends or (target is not None and not conditional) else [place + 1]
        for next_place in (*nexts, *([] if target is None else [target])):
            if next_place < len(kernel.instructions):
                heapq.heappush(ways, (length + 1, writes, (*way, next_place)))
    raise AssertionError(f"{kernel.name}: no way from {start} to {end} that writes")


def is_wide(line: str, kind: str) -> bool:
    """Whether an instruction reads ("LDG") or writes ("STG") 16 or 32 bytes per thread."""
    return re.fullmatch(rf"{kind}\.E(\.\w+)*\.(ENL2\.256|128)", opcode(line)) is not None


def _vote(kernel: Kernel) -> int:
    (vote,) = [i for i, line in enumerate(kernel.instructions) if opcode(line) == "VOTE.ALL"]
    return vote


def opcode(line: str) -> str:
    """The opcode with its modifiers, without the predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";")


@cache
def cuobjdump() -> str | None:
    """The path of cuobjdump in CUDA_HOME, on PATH or in the Triton package."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin")] if home else []
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = [shutil.which("cuobjdump", path=str(p)) for p in places]
    return next(filter(None, [*found[: bool(home)], shutil.which("cuobjdump"), *found]), None)


def why_not() -> str:
    """The reason why the machine code cannot be read; empty if it can."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: there was no CUDA toolkit"
    return "" if cuobjdump() else "cuobjdump, of a CUDA toolkit or of Triton, is not there"


def _readable(symbol: str) -> str:
    """A short name of a kernel: "adam-1 bf16 bf16 mx8" names the rule, flags and formats. Kernels
    named "adam-1 formats" and "adam any" read the rest at run time."""
    rule = re.search(r"INS_\d+([A-Z][a-z]+)E|sweep_anyI[^E]*?\d+([A-Z][a-z]+)E", symbol)
    if rule is None:
        return re.sub(r".*cuda\d+((norm|judge|advance|measure|total)_[a-z]+)E.*", r"\1", symbol)
    name = (rule[1] or rule[2]).lower()
    flags = re.search(r"Lj(\d+)E", symbol)
    if flags is None:
        return f"{name} any"
    if "sweep_formats" in symbol:
        return f"{name}-{flags[1]} formats"
    codes = re.findall(r"(?:FormatE|S\d?_)(\d+)E", symbol.split("Fixed", 1)[1])
    return f"{name}-{flags[1]} " + " ".join(FORMATS[int(code)] for code in codes)


def _run(tool: str, *arguments: str, folder: str | None = None) -> str:
    command = [str(Path(cuobjdump() or "").with_name(tool)), *arguments]
    made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    return made.stdout


def is_read(name: str) -> bool:
    """Whether the tests read the machine code of a kernel.

    `make test` reads that of all kernels of AdamW, of one kernel that reads the flags and formats
    of each chunk, of those of the rules of torch.optim and Lion for fp32, and of those that are
    not sweeps. Printing the code of all kernels takes 25 s.
    """
    few = re.fullmatch(r"(sgd|adagrad|rmsprop|adam|lion)-\d+ fp32 fp32 fp32|adam-1 .*", name)
    named = name in ("adam any", "lion-1 bf16 bf16 bf16sr")
    beside = name.startswith(("norm", "judge", "advance", "measure", "total"))
    return THOROUGH or bool(few) or named or beside


@cache
def is_sample() -> bool:
    """Whether the library has only a sample of the kernels (csrc/cuda/combinations.h)."""
    return b"has only a sample of the kernels" in LIBRARY.read_bytes()


@cache
def kernels() -> list[Kernel]:
    """Every kernel of the library, once per architecture."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = ""
    for line in _run("cuobjdump", "--dump-resource-usage", str(LIBRARY)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+?):$", line.strip()):
            symbol = match[1]
        elif "REG:" in line:
            resources = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
            found[arch, symbol] = Kernel(_readable(symbol), arch, resources)
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "--extract-elf", "all", str(LIBRARY.resolve()), folder=folder)
        for part in Path(folder).iterdir():
            arch = re.search(r"\.(sm_\w+)\.", part.name)[1]
            _read(part, {name: kernel for (a, name), kernel in found.items() if a in ("", arch)})
    return list(found.values())


def _address(places: dict[str, str], label: re.Match[str]) -> str:
    return f"0x{places[label[1]]}"


def _read(part: Path, found: dict[str, Kernel]) -> None:
    """Reads the instructions of the kernels that the tests read from an ELF file of the library.

    Args:
        part: the file.
        found: symbol -> kernel.
    """
    table = subprocess.run(["readelf", "-sW", part], check=True, capture_output=True, text=True)
    symbols = re.findall(r"^\s*(\d+): .* FUNC .*?(\S+)$", table.stdout, re.MULTILINE)
    read = [index for index, name in symbols if name in found and is_read(found[name].name)]
    if not read:
        return
    text = _run("nvdisasm", "-ndf", "-c", "-fun", ",".join(read), str(part))
    for section in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, lines = section.partition(":\n")
        places = dict(re.findall(LABEL, lines, re.MULTILINE))
        lines = re.sub(r"`\((\.L_x_\d+)\)", partial(_address, places), lines)
        found[name].instructions = instructions_in(lines)


def instructions_in(text: str) -> list[str]:
    """The instructions in the output of nvdisasm or of cuobjdump --dump-sass."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+([^/;]+);", text, re.MULTILINE)
    return [line.strip() for line in found]
