"""bench.gate, bench.sizes and bench.share on given result lines, without timings."""

from __future__ import annotations

import importlib
import json

import pytest

from bench import gate, results, share, sizes
from onepass_tools.benchmark import devices, timing


def line(provider, p20, p50, p80, date="2026-01-01", device="cpu", **more):
    found = dict.fromkeys(results.FIELDS)
    found |= {"provider": provider, "provider_version": "1", "date": date, "device": device}
    found |= {"rule": "adamw", "param_dtype": "fp32", "states": "fp32", "list": "50M"}
    found |= {"weights": "native", "ms": {"p20": p20, "p50": p50, "p80": p80}}
    return {**found, "bytes": 1000, "numel": 50, "dirty": False, "torch": "2", **more}


BEFORE = [line("onepass-cpu", 9, 10, 11), line("torch-fused", 18, 20, 22)]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(path)


@pytest.mark.parametrize(
    ("ours", "theirs", "code", "word"),
    [
        ((9, 10, 11), (18, 20, 22), 0, "0 worse, 0 better"),
        ((90, 100, 110), (180, 200, 220), 0, "0 worse, 0 better"),  # a machine ten times slower
        ((11, 12, 13), (18, 20, 22), 0, "0 worse, 0 better"),  # within the spread of the samples
        ((18, 20, 22), (18, 20, 22), 1, "WORSE  adamw/fp32/states-fp32/50M: torch-fused"),
        ((4, 5, 5), (18, 20, 22), 0, "better  adamw"),
    ],
)
def test_the_gate_compares_ratios(ours, theirs, code, word, tmp_path, capsys):
    write(tmp_path / "old" / "cpu.jsonl", BEFORE)
    new = [line("onepass-cpu", *ours, "2026-02-01"), line("torch-fused", *theirs, "2026-02-01")]
    arguments = [write(tmp_path / "new.jsonl", new), "--against", str(tmp_path / "old")]
    assert gate.main(arguments) == code
    assert word in capsys.readouterr().out


def test_the_gate_keeps_devices_and_runs_apart(tmp_path, capsys):
    old = write(tmp_path / "old" / "cpu.jsonl", BEFORE)
    other = [line("onepass-cpu", 1, 1, 1, device="gpu"), line("torch-fused", 1, 1, 1, device="gpu")]
    for new in (write(tmp_path / "new.jsonl", other), old):  # a file is not compared with itself
        assert gate.main([new, "--against", str(tmp_path / "old")]) == 2
        assert "has no case" in capsys.readouterr().err
    apart = [BEFORE[0], line("torch-fused", 1, 1, 1, date="2026-02-01")]
    assert gate.ranges(apart) == {}
    with pytest.raises(SystemExit) as stop:
        gate.main([str(tmp_path / "nothing")])
    assert stop.value.code == 2


def test_the_copy_counts_by_its_bytes():
    copy = line("copy", 30, 40, 50, bytes=4000)
    (found,) = gate.ranges([BEFORE[0], copy]).values()
    assert found.middle == 1.0


@pytest.mark.parametrize(("constant", "slope"), [(0.02, 5e-7), (0.0, 1e-6), (3.0, 0.0)])
def test_the_fit_finds_a_constant_and_a_line(constant, slope):
    points = [(n, constant + slope * n) for n in sizes.SIZES]
    assert sizes.straight(points) == pytest.approx((constant, slope), rel=1e-6, abs=1e-9)
    found = sizes.fit(points)
    assert found[:3] == pytest.approx((constant, slope, slope), rel=1e-6, abs=1e-9)


def test_the_fit_finds_where_the_caches_end():
    true = sizes.Fit(0.02, 3e-7, 6e-7, 3_000_000)
    found = sizes.fit([(n, true.at(n)) for n in sizes.SIZES])
    assert found == pytest.approx(true, rel=1e-6)


def test_the_fit_is_never_negative():
    assert sizes.straight([(1000, 1.0), (2000, 3.0)])[0] == 0.0
    assert sizes.straight([(1000, 3.0), (2000, 1.0)])[1] == 0.0


def test_sizes_and_share_end_to_end(tmp_path, monkeypatch):
    """Lines of bench.sizes and bench.share make tables and a plot, and the report ignores them."""
    monkeypatch.setattr(devices.Device, "smallest_copy", 1 << 12)
    monkeypatch.setattr(timing, "BEYOND_CACHE", 1 << 14)
    results_dir = tmp_path / "results"
    out = results_dir / "sizes.jsonl"
    assert sizes.main(["--most", "3000", "--samples", "2", "--out", str(out)]) == 0
    lines = results.read_lines(out)
    assert {x["numel"] for x in lines} == {1000, 3000}
    assert results.read(out) == []
    text = "\n".join(sizes.table(lines))
    assert text.count("\n| 1K |") == text.count("\n| 3K |") == 1
    sizes.draw(lines, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5000
    out = results_dir / "share.jsonl"
    assert share.main(["--quick", "--samples", "2", "--out", str(out)]) == 0
    lines = results.read_lines(out)
    assert [x["provider"] for x in lines] == list(share.OPTIMIZERS)
    for x in lines:
        assert abs(x["share"] - x["step_ms"] / (x["step_ms"] + x["backward_ms"])) < 1e-5
    assert results.read(out) == []
    assert "| torch-forloop |" in "\n".join(share.table(lines))
    times = {"onepass": 2.0, "torch-fused": 1.5}
    timed = [{**line, "step_ms": times.get(line["provider"], 3.0)} for line in lines]
    slower = [x for x in share.table(timed) if x.endswith("less time per step than onepass.")]
    assert slower == ["torch-fused takes 25.0% less time per step than onepass."]


@pytest.mark.parametrize("name", ["bench.sizes", "bench.share"])
def test_usage(name, capsys):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as stop:
        main(["--samples", "0"])
    assert stop.value.code == 2
