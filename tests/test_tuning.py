"""bench.tuning: an interrupted and resumed dry run, the report page, the variants. No timings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

import onepass
from bench import digest, results, sources, tuning, tuning_report
from bench.tuning_variants import (
    BASE,
    CHUNKS,
    FORMATS,
    RINGS,
    VARIANTS,
    Variant,
    digest_cases,
    today,
)
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass_tools.benchmark.devices import DEVICES

from . import cuda_code, cuda_shim
from .support.thorough import thorough
from .test_package import ROOT

CHOSEN = tuning.DRY_FORMATS
PAGE = f"before\n\n{tuning_report.START}\nold\n{tuning_report.END}\n\nafter\n"
compiled = pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-")


def lines_of(path, kind):
    return [x for x in results.read_lines(path) if x["kind"] == kind]


@pytest.fixture
def run(tmp_path):
    """The command line of a dry run in a temporary folder; keyword arguments replace its
    options."""

    def arguments(**other):
        settings = {
            "formats": ",".join(CHOSEN),
            "libraries": tmp_path / "libraries",
            "out": tmp_path / "tuning.jsonl",
        }
        settings |= other
        return ["--dry", *(f"--{name}={value}" for name, value in settings.items())]

    return arguments


@thorough
@compiled
def test_a_dry_run_is_interrupted_and_resumed(run, tmp_path, capsys):
    out = tmp_path / "tuning.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-m", "bench.tuning", *run()],
        cwd=ROOT,
        # The same number of threads as in the tests, because it is part of the device name.
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for text in first.stdout:
        if text.startswith("round 1"):
            break
    first.kill()
    first.wait()
    before = out.read_text()
    assert {x["format"] for x in lines_of(out, "tuning")} == set(CHOSEN)
    assert len(lines_of(out, "tuning")) < 8

    assert tuning.main(run()) == 0
    assert out.read_text().startswith(before)
    measured = Counter((x["variant"], x["round"], x["format"]) for x in lines_of(out, "tuning"))
    dry = VARIANTS[: tuning.DRY_VARIANTS]
    assert measured == Counter((v.name, r, f) for v in dry for r in (0, 1) for f in CHOSEN)
    line = lines_of(out, "tuning")[-1]
    assert line.items() >= {"device": DEVICES["cpu"].name, "numel": 4096}.items()
    assert line["sources"] == sources.kernel_hashes()
    assert {x["format"]: x["verdict"] for x in lines_of(out, "tuning-winner")} == dict.fromkeys(
        CHOSEN, "equal"
    )

    # All results are present, so nothing is measured or compared again.
    whole = out.read_text()
    capsys.readouterr()
    assert tuning.main(run()) == 0
    assert out.read_text() == whole
    assert "0 processes to run" in capsys.readouterr().out

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert tuning.main([*run(docs=page), "--report"]) == 0
    text = page.read_text()
    assert text.startswith("before\n\n<!--")
    assert text.endswith("-->\n\nafter\n")
    for name in CHOSEN:
        row = next(x for x in text.splitlines() if x.startswith(f"| {name} |"))
        assert row.endswith("| equal |")
    for variant in dry:
        assert f"| {variant.name} | " in text

    # A wrong digest of the reference.
    wrong = tmp_path / "wrong.jsonl"
    named = digest_cases(CHOSEN[0])
    known = [x for x in results.read_lines(digest.FILE) if x["case"].startswith(named)]
    known = [x for x in known if x["backend"] == "reference"]
    known[0]["digest"] = "0" * 64
    results.append(wrong, known)
    again = tmp_path / "again.jsonl"
    results.append(again, lines_of(out, "tuning"))
    capsys.readouterr()
    assert tuning.main(run(out=again, digests=wrong, formats=CHOSEN[0])) == 1
    assert re.search(r"fp32: \S+ is the fastest, .* ms: bits differ", capsys.readouterr().out)
    (verdict,) = lines_of(again, "tuning-winner")
    assert verdict["verdict"] == "differ"
    assert known[0]["case"] in verdict["output"]


@thorough
@compiled
def test_failing_process_is_reported_and_the_others_run(run, tmp_path, monkeypatch, capsys):
    """The library of one variant does not load. Without digests nothing is compared."""

    def compile_one(variant, target):
        target.write_bytes(b"") if variant == BASE else shutil.copy(onepass.ops.LIBRARY, target)
        return ""

    monkeypatch.setattr(tuning, "copy_cpu_library", compile_one)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    arguments = run(digests=tmp_path / "none.jsonl", formats=CHOSEN[0])
    assert tuning.main(arguments) == 1
    told = capsys.readouterr().out
    assert f"{BASE.name}:  FAILED: exit status 2" in told
    assert f"fp32: {VARIANTS[1].name} is the fastest" in told
    assert "bits not compared" in told
    assert len(lines_of(tmp_path / "tuning.jsonl", "tuning")) == 1


def test_arguments_that_are_wrong(capsys):
    for arguments, why in (
        (["--formats", "fp64"], "--formats must be among fp32, "),
        (["--variants", "7x7*"], "no variant matches '7x7*'"),
        (["--samples", "0"], "--samples must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            tuning.main(arguments)
        assert stop.value.code == 2
        assert why in capsys.readouterr().err


def test_the_page_without_lines_and_without_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ["--report", "--out", str(tmp_path / "none.jsonl"), "--docs", str(page)]
    assert tuning.main(arguments) == 0
    assert "Not measured yet" in page.read_text()
    assert "old" not in page.read_text()
    page.write_text("nothing")
    assert tuning.main(arguments) == 2
    assert page.read_text() == "nothing"


def test_committed_page_matches_the_committed_lines(tmp_path):
    page = tmp_path / "cuda.md"
    shutil.copy(ROOT / "docs" / "cuda.md", page)
    assert tuning.main(["--report", "--docs", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / "cuda.md").read_text()


# --- the variants ----------------------------------------------------------------------------


def test_variants_are_unique_and_include_the_defaults():
    assert len({v.name for v in VARIANTS}) == len(VARIANTS) <= 24
    assert {v.chunk for v in VARIANTS} == set(CHUNKS)
    header = (ROOT / "csrc" / "cuda" / "tuning.h").read_text()
    defaults = re.findall(r"#define (ONEPASS_\w+) (\d+)", header)
    assert {name: int(value) for name, value in defaults} == BASE.macros


SHAPES = """
#include <cstdio>
#include "cuda/tuning.h"

int main() {
  constexpr int kPairs[][2] = {%s};
  for (const auto& [weight, states] : kPairs) {
    const auto shape = onepass::cuda::shape_of(onepass::Format(weight), onepass::Format(states));
    std::printf("%%dx%%d ", shape.threads, shape.blocks_per_sm);
  }
}
"""


@compiled
@pytest.mark.parametrize(
    "variant", [None, VARIANTS[1], RINGS[0]], ids=lambda v: v.name if v else "default"
)
def test_each_format_has_its_launch_shape_and_a_variant_overrides_all(variant, tmp_path):
    """Formats whose kernels need more registers have at most 640 threads per multiprocessor."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pairs = ", ".join(
        f"{{{WEIGHT_FORMATS[weights].codes[dtypes[dtype]]}, {STATE_FORMATS[states].code}}}"
        for dtype, weights, states in FORMATS.values()
    )
    program = tmp_path / "shapes"
    command = ["g++", "-std=c++17", "-I", ROOT / "csrc", "-x", "c++", "-", "-o", program]
    command += [f"-D{name}" for name in variant.defines.split()] if variant else []
    subprocess.run(command, input=SHAPES % pairs, text=True, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    for name, shape in zip(FORMATS, found, strict=True):
        of = variant or today(name)
        many = name == "split8+mx8" or (of.ring and name == "split16+bf16")
        assert shape == f"{of.threads}x{640 // of.threads if many else of.blocks}", name


OTHER = Variant(256, 2, 8192, prefetch=False)
# Lists that the variant has kernels for, and one that it has no kernels for.
COMPARE = """
from bench import digest
from bench.tuning_variants import FORMATS, digest_cases

def check(pattern):
    return digest.main(["--backends", "cuda", "--check", "--cases", pattern])

for name in FORMATS:
    assert check(digest_cases(name) + "chunks") == 0, name
assert check("Lion(lr=0.01,weight_decay=0.1) * mx8 chunks") == 1
"""


@thorough
@pytest.mark.parametrize("variant", [OTHER, *RINGS], ids=lambda variant: variant.name)
def test_a_variant_has_the_bits_and_refuses_other_lists(variant):
    """Runs on the CPU with the stand-in of tests/cuda_shim."""
    if why := cuda_shim.why_not():
        pytest.skip(why)
    command = [sys.executable, "-c", COMPARE]
    environ = {**os.environ, "ONEPASS_CUDA_DEFINES": variant.defines}
    found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "a variant of bench.tuning" in found.stdout


@thorough
def test_variants_compile_and_differ(tmp_path):
    """Variants differ in threads, registers and prefetches in the machine code of sm_90."""
    nvcc, dump = shutil.which("nvcc"), cuda_code.cuobjdump()
    if nvcc is None or dump is None:
        pytest.skip("nvcc is not on PATH" if nvcc is None else "cuobjdump is not there")

    def look(variant):
        cubin = str(tmp_path / f"{variant.name}.cubin")
        command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr"]
        command += ["-arch=sm_90", *(f"-D{name}" for name in variant.defines.split())]
        source = str(ROOT / "csrc" / "generated" / "cuda" / "sweep_adam.cu")
        subprocess.run([*command, "-cubin", source, "-o", cubin], check=True)

        def dumped(option):
            return subprocess.run([dump, option, cubin], check=True, capture_output=True, text=True)

        resources = dumped("--dump-resource-usage").stdout
        registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", resources))
        threads = re.findall(
            r"EIATTR_MAX_THREADS\s+\S+\s+\S+\s+Value:\s+(\w+)", dumped("-elf").stdout
        )
        return registers, {int(n, 16) for n in threads}, "CCTL.E.PF2" in dumped("-sass").stdout

    (today, threads, fetched), (other, others, unfetched) = look(BASE), look(OTHER)
    assert len(today) == len(FORMATS)
    assert today.keys() == other.keys()
    assert (threads, others) == ({128}, {256})
    assert sum(int(other[key]) > int(today[key]) for key in today) >= 3
    assert fetched
    assert not unfetched
