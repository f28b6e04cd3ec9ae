"""`onepass memory`: its output, files, errors and exit codes."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from onepass.integrations import other_libraries
from onepass.integrations.other_libraries import TORCH
from onepass.memory import peers
from onepass.memory.advice import MEASURED, evidence, lora, recommend
from onepass.memory.models import Model, Shape, known
from onepass.memory.models.shapes import BIAS, MATRIX
from onepass.memory.report import Bytes
from onepass.memory.scenarios import Terms, candidate, predicted, report
from onepass.memory.variants import parse
from onepass_tools import EXIT_USAGE, main

from .support.scripts import run_command

SMALL = ["--model", "bert-base"]


def call(capsys, *argv, code=0):
    assert main(["memory", *argv]) == code
    return capsys.readouterr()


def test_a_table(capsys):
    out = call(capsys, *SMALL, "--optimizers", "adamw,adamw+mx8+split8,lion8bit,sgd").out
    assert out.startswith("bert-base: 109,482,240 parameters in bfloat16\n")
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "12.00" in rows["adamw"]  # bytes per parameter: 2 + 2 + 8
    assert "7.06" in rows["adamw+mx8+split8"]
    assert "master/split" in rows["optimizer"]
    assert "EMA" not in rows["optimizer"]  # columns of zeros are left out
    assert "activations" in out


def test_what_does_not_fit_is_marked_with_a_configuration_that_fits(capsys):
    argv = ["--model", "llama-3-8b", "--optimizers", "adamw,lion8bit,adamw+mx8", "--gpu"]
    out = call(capsys, *argv, "50GB").out
    assert re.search(r"^adamw .* 96.4 GB +no: 46.4 GB over 50.0 GB +12.00$", out, re.M)
    assert re.search(r"^lion8bit .* 9.6\d GB left ", out, re.M)
    assert "adamw does not fit; +mx8 would fit: 48.7 GB" in out
    assert "adamw does not fit; +mx8+paged would" in call(capsys, *argv, "40GB").out
    assert "+mx4+paged would fit" not in (out := call(capsys, *argv, "24GB").out)
    assert "adamw does not fit; --mesh fsdp=8 would" in out
    zero1 = [*argv, "24GB", "--mesh", "zero1=8"]
    assert "adamw does not fit; --mesh fsdp=8 would fit: 1" in call(capsys, *zero1).out
    # The configuration that the advice names does fit.
    assert "does not fit" not in call(capsys, *argv, "24GB", "--mesh", "fsdp=8").out
    # 4-bit states come after paging, and with a caution.
    assert "adamw+mx8 does not fit; +paged would" in call(capsys, *argv, "48GB").out
    paged = [*argv[:3], "pagedadamw8bit+split8", "--gpu", "40GB"]
    assert "+mx4" not in call(capsys, *paged).out
    ring = [*argv[:3], "adamw+mx8+paged=9GB", "--gpu", "41GB"]
    assert re.search(r"\+mx4 would fit: 40.* \(caution: 4-bit states were", call(capsys, *ring).out)


def test_json_and_csv_say_the_same(capsys):
    argv = [*SMALL, "--optimizers", "adamw8bit,adamw+master+ema", "--gpu", "1GB"]
    content = json.loads(call(capsys, *argv, "--json").out)
    rows = list(csv.DictReader(io.StringIO(call(capsys, *argv, "--csv").out)))
    assert [r["name"] for r in rows] == ["adamw8bit", "adamw+master+ema"]
    for row, found in zip(rows, content["optimizers"], strict=True):
        for part, value in found["predicted"].items():
            assert int(row[f"predicted_{part}"]) == value
        assert row["measured_peak"] == ""
    first, second = content["optimizers"]
    assert first["fits"]
    assert not second["fits"]
    numel = content["parameters"]
    assert second["predicted"]["companions"] == second["predicted"]["ema"] == 4 * numel
    assert content["source"].startswith("https://")


def test_measured_beside_predicted(capsys):
    names = "adamw,adamw+mx8+split8,pagedlion8bit,torch-adamw-foreach,torch-adamw-fused"
    argv = [*SMALL, "--scale", "0.1", "--optimizers", names, "--measure", "--device", "cpu"]
    content = json.loads(call(capsys, *argv, "--json").out)
    found = {row["name"]: row for row in content["optimizers"]}
    assert all(abs(row["difference"]) < 0.005 for row in found.values())
    # Only foreach makes a copy of the whole parameter list.
    whole = found["torch-adamw-foreach"]["measured"]["weights"]
    for name, row in found.items():
        share = 1 if name == "torch-adamw-foreach" else 0
        assert row["measured"]["temporary"] == pytest.approx(share * whole, abs=0.001 * whole)
    argv[argv.index(names)] = "adamw"
    table = call(capsys, *argv).out
    assert "measured" in table
    assert "%" in table


def test_a_wrong_prediction_is_exit_code_1(capsys, monkeypatch):
    from onepass.memory import scenarios
    from onepass.memory.report import Bytes

    monkeypatch.setattr(scenarios, "predicted", lambda *_: Bytes(weights=1))
    argv = [*SMALL, "--scale", "0.01", "--optimizers", "adamw", "--measure", "--device", "cpu"]
    assert "differs from the prediction by more than 0.5 %" in call(capsys, *argv, code=1).err


def test_plot_and_html_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = [*SMALL, "--gpu", "1GB", "--plot", str(tmp_path / "a.png")]
    captured = call(capsys, *argv, "--html", str(tmp_path / "a.html"))
    assert captured.err.count("wrote ") == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r"https?://|<script|@import|url\(", page)  # loads no other file
    assert "states: 226 MB" in page
    assert "does not fit" in page
    assert ">onepass pagedadamw8bit</b>" in page  # each bar names its library
    assert call(capsys, *argv, "--quiet").err == ""


def test_names_in_a_page_are_escaped():
    from onepass.memory.html_report import page

    found = report(candidate("adamw"), known("bert-base"), Terms())
    found.name = "<i>&amp"
    text = page([found], "<u>", [("<i>",), ("<s>",)], ["<em>"])
    assert not re.search("<i>|<u>|<s>|<em>", text)
    assert "&lt;i&gt;&amp;amp" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "bert-bass"], "did you mean 'bert-base'"),
        ([*SMALL, "--optimizers", "adamx"], "did you mean 'adam"),
        ([*SMALL, "--optimizers", "adamw+mx9"], "did you mean 'mx8'"),
        ([*SMALL, "--optimizers", "adamw+paged=24GX"], "a size must be"),
        ([*SMALL, "--optimizers", ","], "--optimizers is empty"),
        ([*SMALL, "--optimizers", "rmsprop8bit+centered"], "centered=True needs"),
        ([*SMALL, "--optimizers", "adamw+split8", "--dtype", "fp32"], "split8"),
        ([*SMALL, "--gpu", "24GX"], "got '24GX'"),
        ([*SMALL, "--mesh", "fsdp=0"], "fsdp must be a whole number of at least 1; got '0'"),
        ([*SMALL, "--mesh", "fsdp=many"], "fsdp must be a whole number"),
        ([*SMALL, "--mesh", "fsdp=2,zero1=2"], "'zero1' is given twice"),
        ([*SMALL, "--mesh", "zero4=2"], "'zero4' is unknown"),
        ([*SMALL, "--mesh", "fsdp=2,tp=2"], "tp needs the plan of the model"),
        ([*SMALL, "--mesh", "fsdp=4,ep=2"], "ep needs a model whose transformers"),
        ([*SMALL, "--mesh", "fsdp=4,ep=3"], "ep must divide fsdp (4); got 3"),
        ([*SMALL, "--scale", "0"], "--scale must be a number above 0"),
        ([*SMALL, "--dtype", "fp8"], "must be one of fp32"),
        ([*SMALL, "--task", "sleep"], "must be one of pretrain"),
        ([*SMALL, "--recommend"], "--recommend needs --gpu"),
        ([*SMALL, "--reserve", "1GB"], "--reserve needs --gpu"),
        ([*SMALL, "--gpu", "1GB", "--reserve", "1GB"], "--reserve must be below --gpu 1GB"),
        ([*SMALL, "--json", "--csv"], "--json and --csv cannot be combined"),
        ([*SMALL, "--measure", "--mesh", "fsdp=2"], "uses one device"),
        ([*SMALL, "--snapshot", "x"], "needs --measure on a CUDA device"),
        ([*SMALL, "--plot", "/nonexistent/a.png"], "cannot be written"),
        ([*SMALL, "--plot", "a.word"], "not supported"),
        (["--model", __file__], "must be a transformers configuration"),
        (["--model", "llama-3.1-405b", "--measure"], "--scale"),
        ([], "--model is missing"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv, says, capsys):
    pytest.importorskip("matplotlib")
    captured = call(capsys, *argv, code=EXIT_USAGE)
    assert captured.err.startswith("onepass: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_lists_of_models_and_optimizers(capsys):
    out = call(capsys, "--list-models").out
    assert re.search(r"^llama-3-8b +8,030,261,248 +https://\S+$", out, re.M)
    out = call(capsys, "--list-optimizers").out
    assert re.search(r"^adamw8bit +onepass.AdamW8bit$", out, re.M)
    assert all(name in out for name in peers.PEERS)
    assert "split8" in out


TWO = Model("two", (Shape("a", (1024, 1024), MATRIX), Shape("b", (33,), BIAS)))
"""A matrix of 2^20 elements and a vector of 33."""


@pytest.fixture
def no_libraries(monkeypatch):
    monkeypatch.setattr(other_libraries, "load", lambda *_: (None, "it is not installed"))


def test_a_peer_that_cannot_run_has_the_bytes_of_its_formula(capsys, no_libraries):
    others = [name for name, p in peers.PEERS.items() if p.made.library != TORCH]
    argv = [*SMALL, "--optimizers", ",".join(["adamw", *others]), "--scale", "0.01", "--measure"]
    out = call(capsys, *argv).out
    rows = {line.split()[0]: line.split() for line in out.split("\n\n")[1].splitlines()}
    for name in others:
        assert rows[name][1] == "*"
        assert "-" not in rows[name][: rows["optimizer"].index("difference")]
        assert "not run" in " ".join(rows[name])
    text = "it is not installed; predicted by a formula from the source of optimi 0.3.3"
    assert f"optimi-adamw, optimi-lion: {text}\n" in out
    assert rows["adamw"][1] != "*"


def test_formulas_without_the_libraries(no_libraries):
    n = 1 << 20
    for name, moments, companions, temporary, host in (
        ("bitsandbytes-adamw", 8 * (n + 33), 0, 0, 0),
        ("bitsandbytes-adamw8bit", 2 * (n + n // 256 * 4 + 1024 + 4 * 33), 0, 0, 0),
        ("bitsandbytes-pagedlion8bit", n // 256 * 4 + 1024 + 4 * 33, 0, 0, n),
        ("torchao-adamw4bit", 2 * (n // 2 + n // 128 * 4 + 64 + 2 * 33) + 8, 0, 0, 0),
        ("flashoptim-lion", n + n // 32 * 2 + 33 + 4, n + 33, 0, 0),
        ("optimi-adamw", 4 * (n + 33), 2 * (n + 33), 2 * n, 0),
        ("lion-pytorch", 2 * (n + 33), 0, 4 * n, 0),
    ):
        found = predicted(candidate(name), TWO, Terms())
        weights = 2 * (n + 33)
        assert found == Bytes(
            weights, weights, moments, companions, temporary=temporary, host=host
        ), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [n for n, p in peers.PEERS.items() if p.made.library != TORCH])
def test_formulas_are_as_simulated(name, dtype, monkeypatch):
    """Compares each formula with a simulated step, where the library is installed."""
    peer = peers.PEERS[name]
    if peer.by_formula:
        pytest.skip(peer.made.library.unavailable() or "it cannot be constructed without a GPU")
    uneven = (Shape("c", (65, 64), MATRIX), Shape("d", (70_001,), BIAS), Shape("e", (), BIAS))
    model, terms = Model("five", (*TWO.shapes, *uneven)), Terms(dtype, device="cuda")
    simulated = predicted(candidate(name), model, terms)
    monkeypatch.setattr(peers.Peer, "by_formula", True)
    assert predicted(candidate(name), model, terms) == simulated


@pytest.mark.parametrize("name", [n for n, p in peers.PEERS.items() if p.made.library != TORCH])
def test_other_libraries_take_what_is_predicted(name):
    peer = peers.PEERS[name]
    why = peer.unavailable("cpu")
    if why:
        pytest.skip(f"{name}: {why}")
    found = report(candidate(name), known("gpt2").scaled(0.05), Terms(), measured=True)
    assert found.problem == ""
    assert abs(found.difference("held")) < 0.005
    assert peer.unseen or abs(found.difference()) < 0.005


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("rich", [True, False])
def test_a_narrow_table_keeps_names_and_peaks(width, rich, capsys, monkeypatch, no_libraries):
    monkeypatch.setenv("COLUMNS", str(width))
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    names = "adamw,adamw+mx8+split8,bitsandbytes-pagedadamw8bit,optimi-adamw"
    out = call(capsys, *SMALL, "--optimizers", names, "--gpu", "1GB").out
    assert max(len(line) for line in out.splitlines()) <= width
    for name in names.split(","):  # the name can be a line of its own
        assert re.search(rf"^{re.escape(name)}( \*)?\s.*\d [MG]B ", out, re.M), out
    assert "no: 314 MB over 1.00 GB" in out or (rich and width == 60)
    left_out = re.sub(r"\s+", " ", out.split("left out at ")[1].split(" (--csv")[0])
    assert left_out.startswith(f"{width} columns: temporary, ")
    # A pipe without COLUMNS has every column.
    monkeypatch.delenv("COLUMNS")
    assert "left out" not in call(capsys, *SMALL, "--optimizers", "adamw").out


# --- output to a pipe and to a terminal ------------------------------------------------------

COMMAND = ["memory", *SMALL, "--scale", "0.02", "--measure"]
COMMAND += ["--device", "cpu", "--optimizers", "adamw,lion8bit"]


def test_no_control_characters_in_a_pipe():
    result = run_command(*COMMAND)
    assert result.returncode == 0, result.stderr
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    assert result.stderr == ""


def read(terminal):
    """Reads what is written to a pseudoterminal until it is closed."""
    found = b""
    with suppress(OSError):  # Linux reports a closed pseudoterminal as an error
        while chunk := os.read(terminal, 4096):
            found += chunk
    return found


@pytest.mark.parametrize("quiet", [False, True])
def test_the_progress_bar_is_shown_only_on_a_terminal(quiet):
    pytest.importorskip("tqdm")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    argv = [*COMMAND, "--json", *(["--quiet"] if quiet else [])]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, leader)
        result = run_command(*argv, stderr=os.ttyname(follower))
        os.close(follower)
        shown = reading.result()
    os.close(leader)
    assert result.returncode == 0, shown
    assert len(json.loads(result.stdout)["optimizers"]) == 2
    assert (b"optimizer" in shown) != quiet
    assert not quiet or shown == b""


# --- advice ----------------------------------------------------------------------------------


def advice(name, gigabytes, task="pretrain"):
    return recommend(known(name), Terms(), gigabytes * 10**9, 0, task)


def test_advice_with_enough_memory():
    assert advice("resnet-50", 1000).chosen.name.startswith("sgd+momentum")
    assert advice("llama-3-8b", 1000).chosen.name.startswith("adamw")
    assert advice("llama-3-8b", 1000, "finetune").chosen.name.startswith("adamw")
    assert advice("llama-3-8b", 1000, "qlora").chosen.name == "adamw"


def test_less_memory_takes_smaller_formats_then_pages():
    found = [advice("llama-3-8b", gb, "finetune") for gb in (120, 60, 45)]
    names = [each.chosen.name for each in found]
    assert names == ["adamw+split16", "adamw8bit+split8", "pagedadamw8bit+split8"]
    assert found[1].reasons[0].startswith("adamw8bit+split8: 56.7 GB of 60.0 GB")
    assert "adamw+split16 takes 112 GB, 52.4 GB over" in found[1].reasons[1]
    # The reasons state the evidence for the formats, its scale, and make no claim of speed.
    assert not any("evidence" in reason for reason in found[0].reasons)
    assert any("this model trains 31,542 times as many" in reason for reason in found[1].reasons)
    assert not re.search("faster|slower|speed", " ".join(found[1].reasons))


def test_the_measured_scale_is_that_of_the_training_page():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text("utf-8")
    assert f"A byte-level GPT of {MEASURED:,} parameters" in page
    for row, words in (("bf16 + split8 + mx8", "parity"), ("Lion mx8", "parity")):
        assert f"- **{row}**: {words}." in page
    assert "the rms of the step differs by +9.4% (limit 20%)" in page  # CAUTION


def test_four_bits_are_last_and_have_a_caution():
    names = [found.name for found in advice("llama-3-8b", 1000).reports]
    assert [name for name in names if "4bit" in name] == [names[-1]]
    four = parse("adamw4bit+split8")
    assert evidence(four, known("llama-3-8b")).startswith("caution: 4-bit states")
    assert "was not compared" in evidence(parse("rmsprop8bit"), known("llama-3-8b"))
    assert evidence(parse("adamw"), known("llama-3-8b")) == ""


def test_nothing_fits(capsys):
    found = advice("llama-3-8b", 24)
    assert found.chosen is None
    assert any("--task lora would fit: adamw: 16.6 GB" in reason for reason in found.reasons)
    assert any("--mesh fsdp=4 would" in reason for reason in found.reasons)
    argv = ["--model", "llama-3-8b", "--gpu", "24GB", "--recommend"]
    assert "nothing fits in 24.0 GB" in call(capsys, *argv, code=1).out
    assert "recommended for lora: adamw" in call(capsys, *argv, "--task", "lora").out
    content = json.loads(call(capsys, *argv, "--task", "qlora", "--json").out)
    assert content["recommended"] == "adamw"
    assert content["reasons"]


def test_adapters_are_as_many_as_published():
    """For Llama 2 7B with rank 64 on every matrix, PEFT counts 159,907,840 parameters.

    NF4 takes 4.127 bits per value.
    """
    adapted = lora(known("llama-2-7b"), 64)
    assert adapted.trained == 159_907_840
    assert adapted.numel == 159_907_840 + known("llama-2-7b").numel
    from onepass.memory.advice import NF4_BITS

    assert pytest.approx(4.127, abs=5e-4) == NF4_BITS
