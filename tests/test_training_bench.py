"""The training benchmark: measured quantities, resuming and the report page. Takes seconds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import onepass
from bench import report, training, training_report
from onepass_tools.demo.data import load

FP32, PERTURBED, SPLIT8 = training.CONFIGS[:3]


@pytest.fixture(scope="module")
def corpus():
    return load(training.QUICK.corpus_bytes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The result file of two quick seeds of every configuration."""
    out = tmp_path_factory.mktemp("training") / "training.jsonl"
    assert training.main(["--quick", "--seeds", "2", "--out", str(out)]) == 0
    return out


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_finished_runs_are_skipped_and_missing_ones_appended(runs, capsys):
    first = runs.read_text()
    lines = read(runs)
    assert len(lines) == 2 * len(training.CONFIGS)
    for line in lines:
        assert line["kind"] == "training"
        assert {"device", "torch", "commit", "date", "python"} <= line.keys()
        assert line["settings"]["steps"] == training.QUICK.steps
    kept = [text for text in first.splitlines() if json.loads(text) != lines[3]]
    runs.write_text("\n".join(kept) + "\n")
    assert training.main(["--quick", "--seeds", "2", "--out", str(runs)]) == 0
    again = read(runs)
    assert len(again) == len(lines)
    assert again[-1]["settings"] == lines[3]["settings"]
    assert again[-1]["validation_loss"] == lines[3]["validation_loss"]


def test_bytes_are_those_of_the_formats(runs):
    expected = {"fp32": 8, "bf16 + split8 + mx8": 1 + 2 + 2 / 32, "Lion mx8": 1 + 1 / 32}
    expected |= {"bf16 + stochastic + mx4": 1 + 2 / 32}
    for line in read(runs):
        wanted = expected.pop(line["settings"]["name"], None)
        if wanted is not None:  # short last blocks and step counters add to it
            assert wanted <= line["state_bytes"] <= 1.07 * wanted
    assert not expected


def test_updates_are_exact_with_fp32_states_only(runs):
    for line in read(runs):
        exact = line["settings"]["states"] == "fp32"
        assert (abs(line["projection"] - 1) < 1e-6) == exact
        assert (line["rms_u"] == pytest.approx(line["rms_u_exact"], rel=1e-6)) == (
            exact or line["settings"]["rule"] == "lion"
        )


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_measured_step_equals_the_step_taken(rule):
    config = dataclasses.replace(FP32, rule=rule, states="mx8")
    options = {**training.RULES[rule], "weight_decay": 0.0}
    param = torch.nn.Parameter(torch.zeros(10_000))
    make = {"adamw": onepass.AdamW, "lion": onepass.Lion}[rule]
    optimizer = make([param], states="mx8", **options)
    watch = training.Watch(config, optimizer)
    torch.manual_seed(0)
    squares = largest = 0.0
    for _ in range(3):
        param.grad = torch.randn(10_000)
        watch.before_step(look=True)
        before = param.detach().clone()
        optimizer.step()
        taken = ((before - param.detach()) / options["lr"]).double()
        squares += float(taken.square().mean()) / 3
        largest = max(largest, float(taken.abs().max()))
    line = watch.compared.line()
    assert line["rms_u"] == pytest.approx(squares**0.5, rel=1e-4)
    assert line["max_u"] == pytest.approx(largest, rel=1e-4)
    assert line["projection"] != 1.0


def test_16_bit_runs_evaluate_the_bf16_weights(corpus):
    """The validation loss of a 16-bit run is computed with the bf16 weights; after six steps, their
    rounding causes most of the difference from fp32."""
    exact = training.train(FP32, training.QUICK, 0, corpus)["validation_loss"]
    coarse = training.train(SPLIT8, training.QUICK, 0, corpus)["validation_loss"]
    assert 0 < abs(coarse - exact) < 0.02


def test_perturbed_weights_are_neighbours():
    shape = training.QUICK.shape
    for name, weight in training.initial(FP32, shape, 3).items():
        other = training.initial(PERTURBED, shape, 3)[name]
        assert (weight != other).all()
        up, down = (torch.nextafter(weight, torch.tensor(x)) for x in (torch.inf, -torch.inf))
        assert ((other == up) | (other == down)).all()


def test_the_page_is_made_of_the_lines(runs, tmp_path):
    assert training.main(["--report", "--out", str(runs), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "training.md").read_text()
    line = read(runs)[0]
    assert f"{line['parameters']:,} parameters" in page
    assert line["commit"] is None or line["commit"][:12] in page
    for config in training.CONFIGS:
        assert page.count(f"\n| {config.name} |") == 1
    assert (tmp_path / "training.png").stat().st_size > 10_000
    missing = tmp_path / "none.jsonl"
    assert training.main(["--report", "--out", str(missing), "--docs", str(tmp_path)]) == 2
    # These lines are not results of the speed benchmark, so its page cannot be built.
    assert report.main(["--results", str(runs.parent), "--docs", str(tmp_path)]) == 2


def fake(name, losses, rms=0.25, states="fp32", baseline="", date="2026-01-01"):
    common = dict.fromkeys(training_report.COMMON, 1)
    settings = {**common, "name": name, "states": states, "baseline": baseline, "rule": "adamw"}
    return {
        seed: {"settings": settings, "seed": seed, "validation_loss": loss, "rms_u": rms}
        | {"device": "cpu", "date": date}
        for seed, loss in enumerate(losses)
    }


@pytest.mark.parametrize(
    ("losses", "rms", "states", "parity", "words"),
    [
        ([2.00, 2.02, 2.04], 0.250, "mx8", True, "the whole interval is within the spread"),
        ([2.00, 2.02, 2.16], 0.250, "mx8", False, "outside the spread of seeds (0.0200)"),
        ([1.90, 1.92, 1.94], 0.250, "mx8", False, "outside"),
        ([1.98, 2.02, 2.06], 0.250, "mx8", True, "but not its whole interval"),
        ([2.00, 2.02, 2.04], 0.259, "mx8", False, "+3.6% (limit 3%)"),
        ([2.00, 2.02, 2.04], 0.240, "mx8", False, "-4.0% (limit 3%)"),
        ([2.00, 2.02, 2.04], 0.290, "mx4", True, "+16.0% (limit 20%)"),
    ],
)
def test_verdicts(losses, rms, states, parity, words):
    runs = {"fp32": fake("fp32", [2.00, 2.02, 2.04])}
    runs["x"] = fake("x", losses, rms, states, "fp32")
    (verdict,) = training_report.judge(runs)
    assert verdict.parity == parity
    assert words in verdict.sentence()
    assert ("no parity" in verdict.sentence()) == (not parity)


def test_the_interval_is_that_of_the_paired_t():
    runs = {"fp32": fake("fp32", [1.0, 2.0, 3.0, 4.0, 5.0])}
    runs["x"] = fake("x", [1.1, 2.2, 3.3, 4.4, 5.5], baseline="fp32")
    (verdict,) = training_report.judge(runs)
    assert verdict.difference == pytest.approx(0.3)
    # Standard deviation 0.158114, divided by sqrt(5), times 2.776 (t with 4 degrees of freedom).
    assert verdict.interval == pytest.approx(0.19629, rel=1e-3)
    assert (
        training_report.judge({"fp32": runs["fp32"], "x": fake("x", [1.0], baseline="fp32")}) == []
    )


def test_the_newest_line_of_a_run_counts():
    old = fake("fp32", [9.0], date="2025-01-01")[0]
    new = fake("fp32", [2.0])[0]
    assert training_report.newest([new, old]) == [new]


def test_usage_errors(tmp_path):
    for arguments in (["--seeds", "0"], ["--quick"], ["--configs", "nobody"]):
        with pytest.raises(SystemExit) as stop:
            training.main(arguments)
        assert stop.value.code == 2
