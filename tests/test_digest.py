"""Digests: the committed ones are current, and a check reports every kind of difference."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

import pytest
import torch

from bench import digest, results
from bench.digest_cases import cases
from onepass.engine.backends import BACKENDS

from . import cuda_shim

CASES = cases()
FEW = [case for case in CASES if case.list == "odd" and case.states != "mixed"][::12]


def committed():
    """The committed digests, as case -> backend -> digest."""
    found = defaultdict(dict)
    for line in results.read_lines(digest.FILE):
        found[line["case"]][line["backend"]] = line["digest"]
    return found


def test_every_case_is_committed_and_the_same_on_every_backend():
    found = committed()
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert found[case.name].keys() == BACKENDS.keys(), case.name
        assert len({*found[case.name].values()}) == 1, case.name


def test_the_cpu_backend_has_the_committed_bits(capsys):
    assert digest.main(["--check", "--backends", "cpu"]) == 0
    assert f"{len(CASES)} equal the committed digests, 0 differ" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_the_other_backends_have_them_in_a_few_cases(backend, monkeypatch):
    if backend == "cuda":
        if why := cuda_shim.why_not():
            pytest.skip(why)
        monkeypatch.setitem(BACKENDS, "cuda", cuda_shim.ShimBackend())
    if why := BACKENDS[backend].unavailable(torch.device("cpu")):
        pytest.skip(why)
    found = committed()
    for case in FEW:
        assert digest.digest(case, backend) == found[case.name]["reference"], case.name


def test_numbers_do_not_depend_on_torch():
    value = digest.numbers((1000,), torch.float32, 5)
    # Made from words that NumPy guarantees for this seed.
    assert hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] == NUMBERS
    assert (value == 0).sum() > 50
    magnitudes = value[value != 0].abs()
    assert magnitudes.min() >= 2.0**-20
    assert magnitudes.max() < 2.0**3


NUMBERS = "4277654620307ab6"


def test_a_check_names_cases_that_differ_fail_or_have_no_digest(tmp_path, monkeypatch, capsys):
    lines = [x for x in results.read_lines(digest.FILE) if x["backend"] == "reference"]
    chosen = [case.name for case in CASES if case.optimizer == "SGD" and case.list == "odd"][:3]
    altered = [x | {"digest": "0" * 64} if x["case"] == chosen[0] else x for x in lines]
    kept = [x for x in altered if x["case"] != chosen[1]]
    path = tmp_path / "digests.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in kept))
    monkeypatch.setattr(digest, "FILE", path)
    real = digest.digest

    def failing(case, backend, device="cpu"):
        if case.name == chosen[2]:
            raise RuntimeError("no such kernel")
        return real(case, backend, device)

    monkeypatch.setattr(digest, "digest", failing)
    assert digest.main(["--check", "--backends", "cpu", "--cases", "SGD"]) == 1
    said = capsys.readouterr().out
    assert f"DIFFERS cpu: {chosen[0]}" in said
    assert f"new cpu: {chosen[1]}" in said
    assert f"FAILED cpu: {chosen[2]}: RuntimeError: no such kernel" in said
    assert "1 differ, 1 have none, 1 failed" in said
    assert path.read_text().count("\n") == len(kept)  # a check writes nothing


def test_out_writes_the_lines_to_the_given_file(tmp_path):
    out = tmp_path / "lines.jsonl"
    name = CASES[0].name
    pattern = name.replace("[", "?")
    assert digest.main(["--backends", "cpu", "--cases", pattern, "--out", str(out)]) == 0
    (line,) = results.read_lines(out)
    assert line["kind"] == "digest"
    assert (line["case"], line["backend"]) == (name, "cpu")
    assert line["digest"] == committed()[name]["reference"]


@pytest.mark.parametrize("arguments", [["--cases", "nothing"], ["--backends", "none"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as error:
        digest.main(arguments)
    assert error.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_usage_error(capsys):
    assert digest.main(["--device", "cuda", "--check"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
