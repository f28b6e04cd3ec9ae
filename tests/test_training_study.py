"""The study of mx4: its codes, a small run from end to end, and the report page."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import training_study as study
from bench import training_study_report as report


def spread(seed):
    """512 second moments in 16 blocks, whose values span nine powers of two."""
    random = np.random.default_rng(seed)
    return np.exp2(random.uniform(-9, 0, 512)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("mx4", np.sqrt),
        ("E2M2", np.sqrt),
        ("mx8", lambda v: v),
        ("root, log", np.log),
        ("2^k", lambda v: v),
        ("2^k, log", np.log),
    ],
)
def test_second_moments_are_unbiased(name, measure):
    v = spread(0)
    random = np.random.default_rng(1)
    draws = np.stack([study.SECOND[name](v, random) for _ in range(4000)])
    draws = measure(draws.astype(np.float64))
    error = draws.std(0) / 4000**0.5
    # If the probability of a code is so small that no draw chose it, the spread is zero. The
    # tolerance of 5 draws in 4,000 allows for this.
    assert (np.abs(draws.mean(0) - measure(v)) <= 5 * error + 5 / 4000).all()
    assert len(np.unique(draws[:, 0])) <= 2
    assert max(len(np.unique(draws[:, i : i + 32])) for i in range(0, 512, 32)) <= (
        256 if name == "mx8" else 16
    )


def test_fine_codes_where_a_block_lies_within_their_range():
    random = np.random.default_rng(5)
    v = np.exp2(random.uniform(-5, 0, 64)).astype(np.float32)
    v[40] = 1e-3  # the range of the second block is too wide
    fine = study.SECOND["E2M2"](v, np.random.default_rng(6))
    coarse = study.SECOND["mx4"](v, np.random.default_rng(6))
    assert (fine[32:] == coarse[32:]).all()
    off = np.abs(np.sqrt(fine[:32]) / np.sqrt(v[:32]) - 1)
    assert 0.1 < off.max() < 0.25


@pytest.mark.parametrize("name", [name for name in study.FIRST if name != "nearest"])
def test_first_moments_are_unbiased(name):
    v = spread(2)
    root = np.sqrt(v)
    m = np.random.default_rng(3).standard_normal(512).astype(np.float32) * root
    random = np.random.default_rng(4)
    draws = np.stack([study.FIRST[name](m, root, random) for _ in range(4000)])
    draws = draws.astype(np.float64)
    error = draws.std(0) / 4000**0.5
    assert (np.abs(draws.mean(0) - m) <= 5 * error + 1e-5 * root).all()


def test_floored_changes_only_values_below_the_lowest_code():
    v = np.full(32, 1.0, np.float32)
    v[5:8] = (0.5, 1e-3, 1e-8)
    found = study.floored(v, np.random.default_rng(0))
    assert (found[:7] == v[:7]).all()
    assert 0 < found[7] <= 2**-13


def test_runs_are_kept_and_not_repeated_and_make_a_page(tmp_path, capsys):
    out = tmp_path / "study.jsonl"
    arguments = ["--quick", "--seeds", "2", "--out", str(out)]
    arguments += ["--variants", "fp32", "mx4", "fp32, noise 0.5"]
    assert study.main(arguments) == 0
    text = out.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 6
    assert study.main(arguments) == 0
    assert out.read_text() == text
    fp32, noise, mx4 = lines[:3]
    assert fp32["rms_u"] == fp32["rms_u_exact"]
    assert fp32["projection"] == 1
    # Noise orthogonal to the step, with half of its root mean square.
    assert noise["rms_u"] / noise["rms_u_exact"] == pytest.approx(1.25**0.5, abs=0.01)
    assert noise["projection"] == pytest.approx(1, abs=0.02)
    assert mx4["rms_u"] != mx4["rms_u_exact"]
    names = [variant.name for variant in study.VARIANTS]
    assert report.write(out, tmp_path, names) == 0
    page = (tmp_path / report.PAGE).read_text()
    difference = sum(lines[i]["validation_loss"] - lines[i - 2]["validation_loss"] for i in (2, 5))
    assert "| mx4 | 2 |" in page
    assert f"{difference / 2:+.4f} ±" in page
    assert report.write(tmp_path / "none.jsonl", tmp_path, names) == 2
    capsys.readouterr()


def test_the_page_has_every_machine_with_a_spread_of_seeds():
    line = {
        "validation_loss": 2.0, "rms_u": 0.2, "rms_u_exact": 0.2, "projection": 1.0,
        "signs_differ": 0.0, "max_u": 2.0, "commit": "0" * 40, "dirty": False, "torch": "2",
        "settings": {"variant": {"name": "fp32"}},
    }  # fmt: skip
    runs = [("old", 0), ("old", 1), ("new", 0), ("new", 1), ("new", 1), ("short", 0)]
    lines = [
        {**line, "device": device, "seed": seed, "date": f"2026-01-0{i}", "validation_loss": i}
        for i, (device, seed) in enumerate(runs, 1)
    ]
    page = report.page(lines, ["fp32"])
    assert [x for x in page.splitlines() if x.startswith("## ")] == ["## new", "## old"]
    # Of two lines with the same seed the newer one is used: (3 + 5) / 2.
    assert "| fp32 | 2 | 4.0000 |" in page
    with pytest.raises(ValueError, match="two seeds of fp32"):
        report.page(lines[-1:], ["fp32"])


def test_usage_errors():
    for arguments in (["--seeds", "0"], ["--quick"], ["--variants", "none"]):
        with pytest.raises(SystemExit) as stop:
            study.main(arguments)
        assert stop.value.code == 2
