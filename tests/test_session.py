"""bench/gpu.sh: a dry run of every stage on the CPU, and resuming a killed session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import coverage, session, stages
from bench.session import Session
from bench.stages import STAGES, Part, Stage

from .support.scripts import run_script
from .support.thorough import thorough

ROOT = Path(__file__).parents[1]
SCRIPT = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry"]


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def parts(path):
    return {line["part"]: line["status"] for line in lines(path) if line.get("kind") == "part"}


def script(tmp_path, *arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [*SCRIPT, "--kept", str(tmp_path / "kept.jsonl"), *arguments]
    return {"args": command, "env": environment, "stdout": subprocess.PIPE, "text": True}


@thorough
def test_every_stage_runs_dry(tmp_path):
    done = subprocess.run(**script(tmp_path, "--limit", "100000"), timeout=900)
    ended = parts(tmp_path / "results.jsonl")
    assert ended.keys() == {part.name for stage in STAGES for part in stage.parts}
    failed = {name: how for name, how in ended.items() if how in ("failed", "timed out")}
    assert not failed, (tmp_path / "gpu.log").read_text()[-4000:]
    assert done.returncode == 0
    for line in lines(tmp_path / "results.jsonl"):
        assert line["sources"].keys() == {"cpu", "cuda", "triton"}
        assert line["dirty"] in (True, False, None)
        assert {"library", "clock_mhz", "driver", "torch", "commit"} <= line.keys()
    kinds = {line.get("kind") for line in lines(tmp_path / "results.jsonl")}
    assert {None, "part", "digest", "phase", "sizes", "share"} <= kinds
    assert len([p for p in tmp_path.iterdir() if p.name != "kept.jsonl"]) <= 8

    target = tmp_path / "committed"
    count = session.collect(tmp_path / "results.jsonl", target)
    assert count == len(lines(tmp_path / "results.jsonl"))
    assert session.collect(tmp_path / "results.jsonl", target) == 0
    assert parts(target / "gpu-parts.jsonl") == ended


@thorough
def test_a_session_that_is_killed_goes_on(tmp_path):
    process = subprocess.Popen(**script(tmp_path, "1"), start_new_session=True)
    kept = tmp_path / "kept.jsonl"
    end = time.monotonic() + 300
    while not (kept.exists() and kept.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = parts(kept)
    assert first["digests"] == "passed"
    assert len(first) < len(STAGES[0].parts)
    done = subprocess.run(**script(tmp_path, "1"), timeout=600)
    assert done.returncode == 0
    assert "digests          passed before" in done.stdout
    assert parts(kept).keys() == {part.name for part in STAGES[0].parts}
    assert [x.get("part") for x in lines(kept)].count("digests") == 1


def of(*commands, seconds=20, needs=("cuda",)):
    """A stage whose parts, named a, b, ..., run these commands."""
    made = [
        Part("abc"[i], "-", seconds, command, command, needs) for i, command in enumerate(commands)
    ]
    return [Stage(1, "-", tuple(made))]


def run(tmp_path, chosen, limit=1000.0, repeat=False):
    one = Session(tmp_path, tmp_path / "kept.jsonl", True, limit, repeat)
    return one.run(chosen), one.ended


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path):
    sleep = f"sleep 60.{os.getpid()}"  # no other process has this command
    code, ended = run(tmp_path, of("exit 3", f"{sleep} & {sleep}", "echo fine", seconds=2))
    assert code == 1
    assert ended == {"a": "failed", "b": "timed out", "c": "passed"}
    assert not subprocess.run(["pgrep", "-f", f"^{sleep}$"], capture_output=True).stdout
    said = {x["part"]: (x["status"], x["said"]) for x in lines(tmp_path / "results.jsonl")}
    assert said["c"] == ("passed", "fine")
    # The next call skips only the parts that passed.
    code, ended = run(tmp_path, of("echo now", "echo now", "exit 1"))
    assert (code, ended) == (0, {"a": "passed", "b": "passed", "c": "passed before"})
    assert run(tmp_path, of("exit 1"), repeat=True) == (1, {"a": "failed"})


def test_part_runs_again_if_its_sources_change(tmp_path, monkeypatch):
    run(tmp_path, of("true"))
    hashes = session.sources.kernel_hashes()
    monkeypatch.setattr(session.sources, "kernel_hashes", lambda: {**hashes, "triton": "new"})
    assert run(tmp_path, of("exit 1"))[1] == {"a": "passed before"}
    assert run(tmp_path, of("true", needs=("triton",)))[1] == {"a": "passed"}
    monkeypatch.setattr(session.sources, "kernel_hashes", lambda: {**hashes, "cuda": "new"})
    assert run(tmp_path, of("exit 1"))[1] == {"a": "failed"}


def test_a_folder_may_have_spaces_in_its_name(tmp_path):
    folder = tmp_path / "a b"
    assert run(folder, of("test -e {out} || echo '{{}}' > {out}"))[1] == {"a": "passed"}
    assert lines(folder / "results.jsonl")[0] == {}


def test_page_marks_results_of_older_sources():
    part = STAGES[2].parts[0]
    line = {"device": "a GPU", "date": "2026-01-02T", "commit": "abcdefghi"}
    hashes = session.sources.kernel_hashes()
    for of_line, shown in ((None, "older"), ({"cuda": "x"}, "older"), (hashes, "these")):
        cell = coverage._cell(part, "a GPU", [], [{**line, "sources": of_line}])
        assert cell == f"lines of 2026-01-02 (abcdefg), {shown} sources"
    assert coverage._cell(part, "another", [], [line]) == "not yet"


def test_part_longer_than_the_time_left_is_postponed(tmp_path):
    code, ended = run(tmp_path, of("true", seconds=50), limit=40)
    assert (code, ended) == (0, {"a": "left for the next call"})


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("echo not here: ncu; false", "not here"),
        ("tests /dev/null --collect-only", "skipped"),
    ],
)
def test_part_without_a_passed_test_does_not_pass(tmp_path, command, how):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "test_none.py").write_text("import pytest\npytest.skip('-', allow_module_level=True)")
    command = command.replace("/dev/null --collect-only", f"{folder} || true")
    assert run(tmp_path, of(command))[1] == {"a": how}
    assert run(tmp_path, of("true"))[1] == {"a": "passed"}


def test_stages_need_torch_numpy_and_pytest_alone(tmp_path):
    """Stages import no other packages, which may be missing on the machine with a GPU."""
    lacking = ("rich", "tqdm", "matplotlib", "hypothesis", "expecttest", "xdist", "safetensors")
    modules = [
        "digest",
        "phase",
        "paging",
        "tuning",
        "tuning_step",
        "pretrain",
        "sizes",
        "share",
        "steps",
    ]
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    code += "assert not [m for m in sys.modules if m.startswith('bench.')]\n"
    code += f"for m in {lacking}: sys.modules[m] = None\n"
    code += "".join(f"import bench.{module}\n" for module in modules)
    path = tmp_path / "stages.py"
    path.write_text(code)
    done = run_script(path, ROOT, threads=1)
    assert done.returncode == 0, done.stderr


def test_wrong_usage():
    with pytest.raises(SystemExit) as error:
        session.main(["nothing"])
    assert error.value.code == 2
    assert session.main(["--list"]) == 0


def test_names_are_unique_and_stages_in_order():
    names = [part.name for stage in STAGES for part in stage.parts]
    assert len({*names}) == len(names)
    assert [stage.number for stage in STAGES] == list(range(1, len(STAGES) + 1))
    assert stages.CUDA == ("cuda",)


def test_the_page_is_of_the_committed_lines():
    assert coverage.main(["--check"]) == 0
