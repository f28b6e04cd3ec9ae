"""The command line: its output, the files it writes, and its exit codes."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import onepass
import onepass_tools as cli
from onepass_tools import EXIT_INTERRUPTED, EXIT_USAGE, main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from onepass_tools.demo import data, runner, train
from onepass_tools.demo.model import GPT, count_parameters
from onepass_tools.demo.recipes import recipes

KEYS = ["torch-adamw", "onepass-adamw", "onepass-adamw-bf16", "onepass-lion", "onepass-sgd"]
KEYS += ["onepass-muon"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that a quick demo has written."""
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--device", "cpu", "--quiet", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(demo: Path) -> dict[str, object]:
    return json.loads((demo / "results.json").read_text())


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_USAGE
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f" {command.name} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onepass {cli.package_version('onepass')}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("dmo", "did you mean 'demo'?"), ("infos", "did you mean 'info'?"), ("zzz", None)],
)
def test_mistyped_command(typed: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == EXIT_USAGE
    err = capsys.readouterr().err
    names = ", ".join(command.name for command in cli.COMMANDS)
    assert f"invalid choice: '{typed}' (choose from {names})" in err
    assert (hint in err) if hint else ("did you mean" not in err)


def test_info_is_plain_text_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onepass.engine import backends

    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out)
    assert str(torch.__version__) in out
    for name, reason in backends.status():
        assert name in out
        assert " ".join(reason.split()) in out
    assert backends.support_matrix().strip() in out


def test_info_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onepass.formats import STATE_FORMATS
    from onepass.rules import RULES

    monkeypatch.setenv("COLUMNS", "60")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert str(torch.__version__) in out
    rules = out.split("\nsupport\n")[1]
    assert set(re.findall(r"^  (\w+)$", rules, re.M)) == set(RULES)
    for name in STATE_FORMATS:
        served = [rule for rule in RULES.values() if not rule.formats or name in rule.formats]
        assert rules.count(name) >= len(served)
    assert "backends: cpu, cuda, triton, reference" in rules


def test_info_markdown_is_only_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    from onepass.engine import backends

    assert main(["info", "--markdown"]) == 0
    assert capsys.readouterr().out == backends.support_matrix().strip() + "\n"


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_demo_rejects_steps(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", steps, "--out", str(tmp_path / "out")]) == EXIT_USAGE
    assert capsys.readouterr().err == f"onepass: --steps must be at least 1; got {steps}\n"
    assert not (tmp_path / "out").exists()


def test_demo_rejects_a_directory_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main(["demo", "--out", str(out)]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith(f"onepass: --out {out} cannot be written: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_demo_rejects_a_missing_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--device", "cuda", "--out", str(tmp_path)]) == EXIT_USAGE
    assert "no CUDA device" in capsys.readouterr().err


def test_demo_names_the_extra_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == EXIT_USAGE
    err = capsys.readouterr().err
    install = "install them with pip install 'onepass[cli]'"
    assert err == f"onepass: missing packages: matplotlib; {install}\n"


def test_demo_runs_every_optimizer_and_writes_its_results(
    demo: Path, results: dict[str, object]
) -> None:
    assert (demo / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = results["config"]["steps"]
    assert [run["key"] for run in results["runs"]] == KEYS
    for run in results["runs"]:
        assert len(run["train_loss"]) == steps
        assert run["validation_steps"][-1] == steps
        # Every optimizer must be better than a uniform guess, ln(256), after a few steps.
        assert run["validation_loss"][-1] < 5.5451
        assert run["optimizer_ms"] > 0
    # All optimizers start from the same weights and see the same first batch.
    assert len({run["train_loss"][0] for run in results["runs"]}) == 1
    assert len(results["summary"]) == len(KEYS)


def test_demo_measures_the_bytes_of_the_states(results: dict[str, object]) -> None:
    expected = {
        "torch-adamw": 8,
        "onepass-adamw": 8,
        "onepass-adamw-bf16": 4,
        "onepass-lion": 4,
        "onepass-sgd": 4,
    }
    # Muon stores one moment of the matrices, AdamW two of all other parameters.
    model = GPT(runner.QUICK.shape)
    rest = onepass.muon_groups(model)[1]["params"]
    expected["onepass-muon"] = 4 + 4 * sum(p.numel() for p in rest) / count_parameters(model)
    for run in results["runs"]:
        # Step counters and alignment padding add to the expected bytes.
        over = run["state_bytes_per_parameter"] - expected[run["key"]]
        assert 0 <= over < 0.2, run["key"]


def test_demo_adamw_is_torch_adamw(results: dict[str, object]) -> None:
    replay = results["onepass_adamw_against_torch"]["replay"]
    assert replay["steps"] == 10
    # A weight near 1 moves by lr. Its rounding alone is up to 2**-24 / lr of the update.
    assert replay["one_step_max_difference"] < 2.0**-22
    assert replay["relative_difference"] < 1e-4
    # Zero updates would agree trivially.
    assert replay["max_update"] > replay["lr"]


def test_demo_table_is_plain_text_off_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", "--quick", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert all(char.isprintable() or char == "\n" for char in captured.out)
    assert captured.err == ""
    assert f"2 steps for each of {len(KEYS)} optimizers (set with --steps)" in captured.out
    assert f"wrote {tmp_path / 'loss.png'}" in captured.out
    assert f"wrote {tmp_path / 'results.json'}" in captured.out


def test_demo_interrupted_keeps_what_has_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_twice(task: train.Task, recipe: object, steps: int, quiet: bool) -> train.Run:
        if recipe.key == KEYS[2]:
            raise KeyboardInterrupt
        return train.train(task, recipe, steps, quiet)

    monkeypatch.setattr(runner, "train", train_twice)
    argv = ["demo", "--quick", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)]
    assert main(argv) == EXIT_INTERRUPTED
    captured = capsys.readouterr()
    assert captured.err == f"onepass: interrupted, 2 of {len(KEYS)} runs done\n"
    assert "onepass AdamW" in captured.out
    assert "Lion" not in captured.out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["interrupted"] is True
    assert [run["key"] for run in written["runs"]] == KEYS[:2]
    assert (tmp_path / "loss.png").exists()


def test_interrupt_outside_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("onepass_tools.info.run", interrupt)
    assert main(["info"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "onepass: interrupted\n"


def test_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "onepass", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # before the child process has imported torch and prints
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_corpus_parts_share_no_file() -> None:
    corpus = data.load(400_000)
    assert not set(corpus.train_files) & set(corpus.validation_files)
    total = corpus.train.numel() + corpus.validation.numel()
    assert total <= 400_000
    assert 0.05 < corpus.validation.numel() / total < 0.15
    assert not any(set(name.split("/")) & data.SKIPPED for name in corpus.train_files)
    assert data.load(400_000).train_files == corpus.train_files


def test_batches_depend_on_seed_and_index_only() -> None:
    text = torch.arange(5000).remainder(256).to(torch.uint8)
    short = data.Batches(text, 3, 4, 16, seed=1)
    long = data.Batches(text, 30, 4, 16, seed=1)
    other = data.Batches(text, 3, 4, 16, seed=2)
    for index in range(3):
        assert torch.equal(short[index][0], long[index][0])
        assert not torch.equal(short[index][0], other[index][0])
    inputs, targets = short[0]
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal((inputs + 1).remainder(256), targets)


def test_model_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = GPT(runner.QUICK.shape)
    inputs = torch.randint(256, (1, 32), requires_grad=False)
    embedded: list[torch.Tensor] = []
    model.tokens.register_forward_hook(lambda _m, _i, out: embedded.append(out.requires_grad_()))
    targets = torch.full((1, 32), -100)  # all positions but 10 are ignored
    targets[0, 10] = 7
    (grad,) = torch.autograd.grad(model(inputs, targets), [embedded[0]])
    reached = grad[0].abs().sum(-1) > 0
    assert bool(reached[:11].all())
    assert not bool(reached[11:].any())


def test_schedule_warms_up_and_decays() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = train.schedule(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=0.05)


def test_state_bytes_counts_a_shared_storage_once() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    arena = torch.zeros(8)
    for index, parameter in enumerate(parameters):
        optimizer.state[parameter] = {"a": arena[4 * index :][:4], "step": torch.tensor(0.0)}
    assert train.state_bytes(optimizer) == 8 * 4 + 2 * 4


def test_decay_is_on_matrices_only() -> None:
    model = GPT(runner.QUICK.shape)
    for recipe in recipes(torch.device("cpu")):
        *decayed, plain = recipe.build(model).param_groups
        assert {group["weight_decay"] for group in decayed} == {recipe.weight_decay}
        assert plain["weight_decay"] == 0 < recipe.weight_decay
        assert {p.ndim for group in decayed for p in group["params"]} == {2}
        assert {p.ndim for p in plain["params"]} == {1}
