"""``bash bench/gpu.sh``: runs the stages of :mod:`bench.stages` on the GPU of this machine.

Each part appends its own lines to one file, and the session appends a line of kind "part" when the
part has ended. A part is skipped if a line, in this file or among the committed ones, says that it
has passed with the current sources. So the next call continues an interrupted session.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from onepass_tools.benchmark.devices import DEVICES

from . import results, sources
from .results import Line
from .stages import STAGES, Part, Stage

COMMITTED = results.ROOT / "bench" / "results"
KEPT = results.ROOT / "build" / "gpu" / "results.jsonl"
"""A copy of the lines, updated after each part; it stays on the machine between calls."""
NOT_HERE = (
    "not here: ",
    "Device not supported",
    "LibraryNotLoaded",
    "ERR_NVGPUCTRPERM",
    "driver version is insufficient",
)
"""Texts in the output of a part that cannot run on this machine."""
FILES = {
    None: "gpu.jsonl",
    "page": "paging.jsonl",
    "digest": "gpu-digests.jsonl",
    "part": "gpu-parts.jsonl",
    "tuning-winner": "tuning.jsonl",
}
"""Kind of a line -> its file in bench/results, if the file is not named after the kind."""


def evidence(part: Part, device: str) -> Line:
    """The fields that a line must have to show that a part passed with the current sources."""
    hashes = sources.kernel_hashes()
    return {"part": part.name, "device": device, "of": {name: hashes[name] for name in part.needs}}


def passed(part: Part, device: str, known: Sequence[Line]) -> bool:
    """Whether a line says that a part has passed on this device with the current sources."""
    wanted = evidence(part, device)
    return any(
        line.get("kind") == "part"
        and line["status"] == "passed"
        and all(line[key] == value for key, value in wanted.items())
        for line in known
    )


class Session:
    """One call of the script.

    Args:
        out: folder of the result lines and the log.
        kept: file that keeps the lines between calls.
        dry: whether to run the commands of the dry run.
        limit: time limit of the call in seconds; a part that does not fit is left for the next
            call.
        repeat: whether to run parts that have passed before.

    Attributes:
        lines: the file of the result lines.
        log: the file of the output.
        device: "cpu" in a dry run, else "cuda".
        begin: start time.
        ended: name of a part -> its result.
    """

    def __init__(self, out: Path, kept: Path, dry: bool, limit: float, repeat: bool) -> None:
        self.dry, self.limit, self.repeat = dry, limit, repeat
        self.lines, self.log, self.kept = out / "results.jsonl", out / "gpu.log", kept
        out.mkdir(parents=True, exist_ok=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists() and not self.lines.exists():
            shutil.copyfile(kept, self.lines)
        self.device = "cpu" if dry else "cuda"
        self.begin = time.monotonic()
        self.ended: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Prints a line and appends it to the log."""
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs the parts that have not passed yet; returns 0 if none failed, else 1."""
        env = results.environment(self.device)
        known = results.read_lines(self.lines) + results.read_lines(COMMITTED / FILES["part"])
        with tempfile.TemporaryDirectory(prefix="onepass-") as scratch:
            for stage in stages:
                for part in stage.parts:
                    if not self.repeat and passed(part, env["device"], known):
                        self.ended[part.name] = "passed before"
                    elif time.monotonic() - self.begin + part.seconds > self.limit:
                        self.ended[part.name] = "left for the next call"
                    else:
                        self.ended[part.name] = self.part(stage, part, env, scratch)
        self.say("\n".join(f"{name:<16} {how}" for name, how in self.ended.items()))
        failed = [name for name, how in self.ended.items() if how in ("failed", "timed out")]
        if failed:
            self.say(f"failed: {', '.join(failed)}; the output is in {self.log}")
        return int(bool(failed))

    def part(self, stage: Stage, part: Part, env: Line, scratch: str) -> str:
        """Runs a part, appends its line, and returns its result ("passed", "failed" and so on)."""
        out = shlex.quote(str(self.lines.resolve()))
        command = (part.dry if self.dry else part.command).format(out=out)
        self.say(f"=== {stage.number} {stage.name}: {part.name}, time limit {part.seconds} s")
        self.say(f"    {command}")
        start = time.monotonic()
        with self.log.open("ab") as log:
            at = log.tell()
            status = _run(command, part.seconds, log.fileno(), scratch)
        text = self.log.read_bytes()[at:].decode(errors="replace")
        tail = [line for line in text.splitlines() if line.strip()][-15:]
        print("\n".join(tail), flush=True)
        lacking = next((line for line in text.splitlines() if any(w in line for w in NOT_HERE)), "")
        how = "passed" if status == 0 else "timed out" if status is None else "failed"
        if how == "failed" and lacking:
            how = "not here"
        said = (lacking or (tail or [""])[-1])[:200]
        if how == "passed" and command.startswith("tests ") and " passed" not in said:
            how = "skipped"  # all tests were skipped, which is no evidence
        spent = round(time.monotonic() - start, 1)
        self.say(f"=== {part.name}: {how} after {spent:g} s")
        line = {**env, "kind": "part", "stage": stage.name, **evidence(part, env["device"])}
        line |= {"status": how, "seconds": spent, "said": said}
        results.append(self.lines, [line])
        made = self.kept.with_suffix(".new")
        shutil.copyfile(self.lines, made)
        made.replace(self.kept)
        return how


def _run(command: str, seconds: float, log: int, scratch: str) -> int | None:
    """The exit status of a shell command; None if it was killed at its time limit."""
    script = Path(__file__).with_name("parts.sh")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "SCRATCH": scratch,
        "PYTHONPATH": os.pathsep.join(
            [f"{results.ROOT}/python", str(results.ROOT), f"{scratch}/peers"]
            + [p for p in [os.environ.get("PYTHONPATH")] if p]
        ),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        ["bash", "-c", f'. "{script}"; {command}'],
        cwd=results.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def collect(source: Path, target: Path = COMMITTED) -> int:
    """Appends the lines of a session to the files of their kinds; returns the number of new lines.

    Args:
        source: the result lines of a session.
        target: folder of the files.
    """
    known: dict[Path, set[str]] = {}
    count = 0
    for line in results.read_lines(source):
        kind = line.get("kind")
        path = target / FILES.get(kind, f"{kind}.jsonl")
        if path not in known:
            known[path] = {repr(sorted(x.items(), key=str)) for x in results.read_lines(path)}
        key = repr(sorted(line.items(), key=str))
        if key not in known[path]:
            known[path].add(key)
            results.append(path, [line])
            count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    """Runs stages.

    Returns:
        0 if no part failed; 1 if a part failed; 2 on wrong usage or without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description="Runs the tests and benchmarks that need a GPU, in order of importance.",
    )
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help="numbers or names of the stages to run (default all, in order)",
    )
    parser.add_argument("--list", action="store_true", help="list the stages and their parts")
    parser.add_argument("--dry", action="store_true", help="run small commands on the CPU")
    parser.add_argument(
        "--again", action="store_true", help="also run the parts that have passed before"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=570.0,
        metavar="SECONDS",
        help="time limit of this call (default 570)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-out"),
        metavar="FOLDER",
        help="folder of results.jsonl and gpu.log (default gpu-out)",
    )
    parser.add_argument(
        "--kept",
        type=Path,
        default=KEPT,
        metavar="FILE",
        help="file that keeps the lines between calls (default build/gpu/results.jsonl)",
    )
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="FILE",
        help="append the lines of FILE to the files in bench/results, and stop",
    )
    args = parser.parse_args(argv)
    if args.collect is not None:
        if not args.collect.exists():
            parser.error(f"--collect: {args.collect} does not exist")
        print(f"{collect(args.collect)} new lines in {COMMITTED}")
        return 0
    names = {str(stage.number): stage for stage in STAGES} | {stage.name: stage for stage in STAGES}
    unknown = [name for name in args.stages if name not in names]
    if unknown:
        parser.error(f"STAGE must be among {', '.join(names)}; got {unknown[0]!r}")
    chosen = [s for s in STAGES if not args.stages or s in [names[n] for n in args.stages]]
    if args.list:
        for stage in chosen:
            for part in stage.parts:
                row = f"{stage.number} {stage.name:<10} {part.name:<16} {part.seconds:>4} s"
                print(f"{row}  {part.shows}")
        return 0
    if not args.dry and (why := DEVICES["cuda"].unavailable()):
        print(f"bench/gpu.sh: {why}", file=sys.stderr)
        return 2
    return Session(args.out, args.kept, args.dry, args.limit, args.again).run(chosen)


if __name__ == "__main__":
    sys.exit(main())
