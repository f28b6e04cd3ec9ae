"""`onepass bench`: parsing of sizes, usage errors, and one tiny run. Times are not tested."""

from __future__ import annotations

import pytest

import onepass
from onepass_tools import EXIT_USAGE, UsageError, main
from onepass_tools.bench import size
from onepass_tools.benchmark import devices, table, timing
from onepass_tools.benchmark.cases import BEYOND_CACHE


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("2500", 2500),
        ("20k", 20_000),
        ("100M", 100_000_000),
        ("1.5B", 1_500_000_000),
        ("1.0005K", None),
        ("1e6", 1_000_000),
        ("1_000_000", 1_000_000),
        ("3 m", 3_000_000),
        ("0", None),
        ("-1", None),
        ("1.5", None),
        ("M", None),
        ("12X", None),
        ("nan", None),
        ("", None),
    ],
)
def test_sizes(text, number):
    if number is not None:
        assert size(text, "--numel") == number
        return
    with pytest.raises(UsageError, match="--numel must be"):
        size(text, "--numel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "addamw"], "did you mean 'adamw"),
        (["--states", "mx16"], "did you mean 'mx"),
        (["--weights", "split"], "did you mean 'split"),
        (["--dtype", "fp64"], "fp32, bf16, fp16"),
        (["--list", "resnet5"], "did you mean 'resnet50'?"),
        (["--device", "cpuu"], "did you mean 'cpu"),
        (["--numel", "ten"], "such as 2500, 100M or 1.5B; got 'ten'"),
        (["--samples", "0"], "--samples must be"),
        (["--weights", "split8", "--dtype", "fp32"], "needs --dtype bf16"),
        (["--providers", "nobody", "--device", "cpu"], "no provider nobody"),
        (["--numel", "900T", "--device", "cpu"], "GB are free on cpu"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("onepass: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_table_is_plain_text_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(devices.Device, "smallest_copy", 1 << 12)
    monkeypatch.setattr(timing, "BEYOND_CACHE", 1 << 14)
    ours = "onepass-cpu" if not onepass.ops.missing else "torch-fused-fp32"
    arguments = ["--states", "mx8", "--weights", "split8", "--numel", "1K", "--samples", "2"]
    providers = ["--providers", f"{ours},torch-fused-fp32,torch-fused", "--device", "cpu"]
    assert main(["bench", *arguments, *providers]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    first, rows = out.split("\n\n")[0], out.split("\n\n")[1].splitlines()
    assert first.startswith("adamw/bf16-split8/states-mx8/1K: 1,000 elements, 0.012 MB per step\n")
    names = [row.split()[0] for row in rows]
    assert names == ["provider", *dict.fromkeys([ours, "torch-fused-fp32"]), "copy", "in-place"]
    assert len({len(row.split()) for row in rows[1:3]}) == 1
    assert "torch-fused        has no split8 weights" in out


@pytest.mark.parametrize(("size", "shown"), [(BEYOND_CACHE, True), (BEYOND_CACHE - 1, False)])
def test_a_step_within_the_caches_has_no_share_of_the_copy(size, shown):
    one = timing.Timed("torch-fused", "1", step=lambda: None, bytes=size, samples=[1.0])
    assert ("0.500" in table.row(one, 2 * one.gbps)) == shown
