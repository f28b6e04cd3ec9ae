"""The pretraining benchmark on the CPU: runs, resuming, the number of steps and the report page."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import pretrain, pretrain_report
from bench.pretrain_configs import CONFIGS
from onepass_tools.benchmark.devices import DEVICES
from onepass_tools.demo.data import load
from onepass_tools.demo.model import count_parameters

CPU = DEVICES["cpu"]
HERE = [config.name for config in CONFIGS if not config.unavailable(CPU)]


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread is fastest for a model this small. Another fixture restores the number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The result file of a quick run of every available configuration."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("pretrain") / "pretrain.jsonl"
    assert pretrain.main(["--quick", "--out", str(out)]) == 0
    torch.set_num_threads(before)
    return out


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_available_configuration_has_a_line_with_finite_losses(runs):
    lines = read(runs)
    assert [line["settings"]["name"] for line in lines] == HERE
    assert len(HERE) >= 4
    for line in lines:
        assert list(line)[:3] == ["date", "commit", "dirty"]
        assert line["kind"] == "pretrain"
        assert line["settings"]["steps"] == pretrain.QUICK.steps
        assert [step for step, _ in line["validations"]] == list(range(1, 9))
        losses = [loss for _, loss in line["validations"]]
        assert all(map(math.isfinite, [*losses, line["train_loss"]]))
        assert losses[-1] == line["validation_loss"] < losses[0]
        assert line["tokens_per_second"] > 0
        assert 0 < line["optimizer_share"] < 1
        assert line["peak_bytes"] is None


def test_onepass_in_fp32_has_the_losses_of_torch_fused(runs):
    torchs, ours = read(runs)[:2]
    for (step, loss), (other_step, other) in zip(
        torchs["validations"], ours["validations"], strict=True
    ):
        assert step == other_step
        assert loss == pytest.approx(other, abs=1e-3)


def test_bytes_per_parameter_are_those_of_the_formats(runs):
    found = {line["settings"]["name"]: line["bytes_per_parameter"] for line in read(runs)}
    expected = {"torch-fused": 16.0, "onepass-fp32": 16.0}
    # Weight and gradient take 2 bytes each, then come companion and states. Norms are in fp32.
    expected |= {"onepass-split8-mx8": 4 + 1 + 2 + 2 / 32, "onepass-stochastic-mx4": 4 + 1 + 2 / 32}
    for name, least in expected.items():
        assert least <= found[name] <= 1.03 * least


def test_a_second_call_trains_only_what_is_missing(runs, monkeypatch, tmp_path, capsys):
    lines = read(runs)
    out = tmp_path / "some.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not lines[2]))
    assert pretrain.main(["--quick", "--out", str(out)]) == 0
    again = read(out)
    assert len(again) == len(lines)
    assert again[-1]["settings"] == lines[2]["settings"]
    assert again[-1]["validations"] == lines[2]["validations"]
    monkeypatch.setattr(pretrain, "train", None)
    assert pretrain.main(["--quick", "--out", str(out)]) == 0
    assert read(out) == again
    said = capsys.readouterr().out
    assert all(f"not measured: {c.name}" in said for c in CONFIGS if c.name not in HERE)


def test_the_first_configuration_sets_the_steps_of_all(monkeypatch, tmp_path):
    asked = []

    def steps_within(seconds, config, task, device):
        asked.append((seconds, config.name))
        return 3

    monkeypatch.setattr(pretrain, "steps_within", steps_within)
    out = str(tmp_path / "some.jsonl")
    common = ["--quick", "--seconds", "5", "--out", out, "--configs"]
    for name in HERE[:2]:
        assert pretrain.main([*common, name]) == 0
    assert asked == [(5.0, HERE[0])]
    lines = read(tmp_path / "some.jsonl")
    assert [line["settings"]["steps"] for line in lines] == [3, 3]
    assert {line["budget_seconds"] for line in lines} == {5.0}


def test_a_time_budget_gives_a_number_of_steps():
    corpus = load(pretrain.QUICK.corpus_bytes)
    task = pretrain.task_of(pretrain.QUICK, corpus, CPU, 0, pretrain.PROBE)
    steps = pretrain.steps_within(0.5, CONFIGS[0], task, CPU)
    assert steps >= 20
    assert steps % 10 == 0


def test_the_default_model_is_gpt2_of_124_million_parameters():
    with torch.device("meta"):
        model = pretrain.GPT2(pretrain.FULL.shape, pretrain.FULL.vocabulary)
    assert count_parameters(model) == 124_439_808


def test_a_model_with_bf16_weights_computes_as_one_with_the_same_values_in_fp32():
    corpus = load(pretrain.QUICK.corpus_bytes)
    task = pretrain.task_of(pretrain.QUICK, corpus, CPU, 0, 1)
    narrow = next(c for c in CONFIGS if c.dtype == "bf16").model(task)
    wide = task.model()
    wide.load_state_dict(narrow.state_dict())
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with torch.no_grad(), task.autocast():
        assert torch.equal(narrow(*task.train[0]), wide(*task.train[0]))


def test_the_page_is_made_of_the_lines(runs, tmp_path):
    assert pretrain.main(["--report", "--out", str(runs), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "pretrain.md").read_text()
    assert (tmp_path / "pretrain.png").stat().st_size > 10_000
    assert "(pretrain.png)" in page
    measured, left_out = page.split("Not measured: ")
    for config in CONFIGS:
        assert page.count(f"\n| `{config.name}` |") == (config.name in HERE)
        assert f"`{config.name}`" in measured
        assert (f"`{config.name}`" in left_out) == (config.name not in HERE)
    assert f"{read(runs)[0]['parameters']:,} parameters" in page


def test_differences_pair_runs_with_the_same_seed(runs):
    def line(name, seed, loss):
        start = next(x for x in read(runs) if x["settings"]["name"] == name)
        return {**start, "seed": seed, "validation_loss": loss}

    lines = [line("torch-fused", seed, 2.0 + seed) for seed in range(5)]
    lines += [line("onepass-fp32", seed, 2.1 + 1.1 * seed) for seed in range(5)]
    lines += [line("onepass-split8-mx8", 1, 2.5)]
    page = pretrain_report.markdown(lines, "somewhere", "pretrain.png")
    # Standard deviation 0.158114, divided by sqrt(5), times 2.776 (t with 4 degrees of freedom).
    assert "| +0.3000 ± 0.1963 |" in page
    assert "| -0.5000 |" in page
    assert "with 5 seeds" in page
    assert "One seed" not in page


def test_without_lines_nothing_is_written(tmp_path, capsys):
    missing, docs = tmp_path / "none.jsonl", tmp_path / "docs"
    assert pretrain.main(["--report", "--out", str(missing), "--docs", str(docs)]) == 2
    assert "no result lines" in capsys.readouterr().err
    assert not docs.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quick"],
        ["--quick", "--out", str(pretrain.OUT)],
        ["--steps", "0"],
        ["--batch", "0"],
        ["--seeds", "0"],
        ["--first-seed", "-1"],
        ["--seconds", "0"],
        ["--seconds", "5", "--steps", "5"],
        ["--configs", "nobody"],
        ["--device", "nowhere"],
    ],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(arguments)
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_an_error(tmp_path):
    out = str(tmp_path / "none.jsonl")
    assert pretrain.main(["--quick", "--device", "cuda", "--out", out]) == 2
