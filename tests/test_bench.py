"""The benchmark: bytes per step, the check, result lines and one small run, without timings."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import onepass
from bench import bars, cases, report, report_plots, results
from onepass.integrations.other_libraries import TORCH, Library
from onepass_tools.benchmark import check, devices, providers, timing
from onepass_tools.benchmark.cases import DTYPES, OPTIONS, Case
from onepass_tools.benchmark.param_lists import (
    LLAMA_PARTS,
    NAMED,
    gpt2,
    in_words,
    llama3,
    many,
    one,
    resnet50,
    vit_l16,
)
from onepass_tools.benchmark.provider import Provider

command = importlib.import_module("bench.__main__")
main = command.main
TINY = Case("adamw", "fp32", "fp32", many(3, 130, offset=1))
BY_NAME = {provider.name: provider for provider in providers.all_providers()}


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    """Shrinks the copy buffers, which take a second to fill at their real size."""
    monkeypatch.setattr(devices.Device, "smallest_copy", 1 << 12)
    monkeypatch.setattr(timing, "BEYOND_CACHE", 1 << 14)


@pytest.mark.parametrize(
    ("rule", "dtype", "weights", "states", "expected"),
    [
        ("adamw", "fp32", "native", "fp32", 28),
        ("adamw", "bf16", "native", "bf16", 14),
        ("adamw", "bf16", "native", "fp32", 22),
        ("adamw", "fp32", "native", "mx8", 16.125),
        ("adamw", "bf16", "split8", "mx8", 12.125),
        ("adamw", "bf16", "stochastic", "mx4", 8.125),
        ("adamw", "fp32", "native", "dynamic8", 16.0625),
        ("lion", "fp32", "native", "fp32", 20),
        ("sgd", "fp32", "native", "fp32", 20),
        ("adagrad", "fp32", "native", "fp32", 20),
        ("rmsprop", "fp32", "native", "fp32", 20),
    ],
)
def test_bytes_are_those_of_the_tensors_that_a_step_walks(rule, dtype, weights, states, expected):
    case = Case(rule, dtype, states, many(2, 256), weights)
    params = [torch.nn.Parameter(t) for t in case.list.normal(1.0, DTYPES[dtype], 0)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = BY_NAME["onepass-cpu"].make(params, case)
    optimizer.backend = None  # any available backend
    optimizer.step()
    moved = 0
    for param in params:
        own = [v for k, v in optimizer.state[param].items() if k != "step"]
        moved += sum(2 * t.nbytes for t in (param, *own)) + param.grad.nbytes
    assert case.bytes == moved == 512 * expected


def test_parameter_lists_have_the_published_sizes():
    assert one(50_000_000).numel == 50_000_000
    assert [in_words(n) for n in (7, 1000, 2500, 1_500_000_000)] == ["7", "1K", "2.5K", "1.5B"]
    assert in_words(124_439_808) == "124M"
    # Counts of the published models. GPT-2 has tied embeddings, as in its training.
    assert (gpt2().numel, len(gpt2().shapes)) == (124_439_808, 148)
    assert (llama3().numel, len(llama3().shapes)) == (8_030_261_248, 291)
    assert (vit_l16().numel, len(vit_l16().shapes)) == (304_326_632, 296)
    assert (resnet50().numel, len(resnet50().shapes)) == (25_557_032, 161)
    for part in LLAMA_PARTS:
        assert llama3(part).numel == pytest.approx(llama3().numel / part, rel=1e-4)
    with pytest.raises(ValueError, match="got 3"):
        llama3(3)
    for name, make in NAMED.items():
        assert make().name.startswith(name)
    assert many(300, 1).scalars
    assert not many(300, 2).scalars
    odd = many(3, 5, offset=1).empty(torch.float32)
    assert [t.storage_offset() for t in odd] == [1, 1, 1]


def test_case_names_are_unique_and_bars_name_cases():
    assert cases.select(cases.cpu_cases(), "lion")[0].rule == "lion"
    assert {c.rule for c in cases.select(cases.cpu_cases(), "sgd/*")} == {"sgd"}
    assert {c.rule for c in cases.select(cases.cpu_cases(), "sgd/*,lion")} == {"sgd", "lion"}
    for device, (ours, table) in bars.BY_DEVICE.items():
        found = cases.CASES[device](False)
        assert len({case.name for case in found}) == len(found)
        keys = {case.key for case in found}
        served = {provider.name for provider in providers.all_providers(device)}
        for bar in table:
            assert (bar.rule, bar.dtype, bar.weights, bar.states, bar.list) in keys
            assert {ours, bar.other} <= served | {"copy"}


def outcome(case, *chosen):
    return timing.run_case(case, list(chosen), samples=2)


@pytest.mark.parametrize(
    "case", [c for c in cases.cpu_cases(quick=True) if c.list.name == "1M"], ids=lambda c: c.name
)
def test_torch_and_onepass_cpu_pass_the_check(case):
    small = Case(case.rule, case.dtype, case.states, many(3, 130))
    found = outcome(small, *(p for p in BY_NAME.values() if p.name.startswith("torch-")))
    assert found.failed == []
    if not onepass.ops.missing:
        assert outcome(small, BY_NAME["onepass-cpu"]).failed == []


@pytest.mark.parametrize("fault", ["lr", "betas", "eps", "weight_decay", "still"])
def test_a_wrong_provider_is_named_and_not_timed(fault):
    wrong = {"lr": 1.01e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0}

    def make(params, case, device):
        options = dict(OPTIONS["adamw"])
        if fault == "still":
            return torch.optim.SGD(params, lr=0.0)
        options[fault] = wrong[fault]
        return torch.optim.AdamW(params, **options)

    broken = Provider("broken", TORCH, {"adamw": make}, ours=True)
    found = outcome(TINY, broken, BY_NAME["torch-fused"])
    assert [name for name, _ in found.failed] == ["broken"]
    assert found.ours_failed
    assert [one.provider for one in found.timed] == ["torch-fused", "copy", "in-place"]


def steps_in_blocks(states, damage, other_codes=False):
    """Takes two steps in NumPy, damages the weights after the second, and runs the check."""
    case = Case("adamw", "fp32", states, many(1, 4096))
    weights = case.list.normal(0.02, torch.float32, 1)
    grads = case.list.normal(0.01, torch.float32, 2)
    grads[0][::256] = 1e-6 * (1 + torch.arange(16))  # about 1e-4 of the block maximum
    expected = check.Expected(case, weights, grads)
    weights[0].requires_grad_().grad = grads[0]
    optimizer = BY_NAME["onepass-cpu"].make(weights, case)
    optimizer.backend = "reference"
    taken = []

    def step():
        taken.append(optimizer.step())
        if len(taken) == 2:
            damage(expected, weights[0].data)

    return expected, expected.problem(step, weights, grads, 0.0, other_codes)


def test_the_check_widens_the_limit_of_second_moments_that_dynamic8_loses():
    expected, problem = steps_in_blocks("dynamic8", lambda expected, weights: None)
    assert problem == ""
    # Elements whose v is below half of the lowest value of the dynamic map.
    grad = many(1, 4096).normal(0.01, torch.float32, 2)[0].double()
    grad[::256] = 1e-6 * (1 + torch.arange(16))
    largest = grad.abs().view(16, 256).amax(1).repeat_interleave(256)
    lost = (grad / largest) ** 2 < 0.5 * 3.25e-7
    assert torch.equal(expected.lost, lost)
    assert 16 <= int(lost.sum()) < 64
    assert f"{int(lost.sum())} have" in expected.note()
    # Only the lost elements have a wider tolerance.
    assert torch.equal(expected.low[~lost], expected.after[~lost])
    assert torch.equal(expected.high[~lost], expected.after[~lost])


@pytest.mark.parametrize("side", [-1.0, 1.0, float("nan")])
@pytest.mark.parametrize("lost", [True, False])
def test_the_check_sees_a_wrong_step_with_dynamic8(lost, side):
    def damage(expected, weights):
        i = int((expected.lost == lost).nonzero()[7])
        # 1% of the path beyond the limit. Lost moments have no tolerance beyond their bounds.
        beyond = (0.0 if lost else check.COARSE["dynamic8"]) + 0.01
        edge = expected.low[i] if side < 0 else expected.high[i]
        weights[i] = edge + side * beyond * expected.path[i]

    _, problem = steps_in_blocks("dynamic8", damage)
    assert problem.startswith("1 of 4096 compared weights are wrong")


def test_a_first_moment_that_is_small_in_its_block_of_mx8_may_be_a_code_off():
    """Codes are spaced 2^-17 of the block maximum apart, which is more than the moment itself."""
    expected, problem = steps_in_blocks("mx8", lambda expected, weights: None)
    assert problem == ""
    grad = many(1, 4096).normal(0.01, torch.float32, 2)[0].double()
    grad[::256] = 1e-6 * (1 + torch.arange(16))
    largest = grad.abs().view(128, 32).amax(1).repeat_interleave(32)
    small = grad.abs() < largest / 128
    assert torch.equal(expected.lost, small)
    assert 16 <= int(small.sum()) < 128
    assert f"{int(small.sum())} are small" in expected.note()
    assert torch.equal(expected.low[~small], expected.after[~small])
    assert torch.equal(expected.high[~small], expected.after[~small])
    assert bool((expected.low[small] < expected.high[small]).all())


@pytest.mark.parametrize("side", [-1.0, 1.0, float("nan")])
@pytest.mark.parametrize("small", [True, False])
def test_the_check_sees_a_wrong_step_with_mx8(small, side):
    def damage(expected, weights):
        i = int((expected.lost == small).nonzero()[7])
        edge = expected.low[i] if side < 0 else expected.high[i]
        weights[i] = edge + side * (check.COARSE["mx8"] + 0.01) * expected.path[i]

    _, problem = steps_in_blocks("mx8", damage)
    assert problem.startswith("1 of 4096 compared weights are wrong")


@pytest.mark.parametrize(("count", "wrong"), [(40, False), (41, True)])
def test_a_provider_with_other_codes_may_have_one_percent_wrong(count, wrong):
    def damage(expected, weights):
        weights[:count] += 1.0

    assert bool(steps_in_blocks("mx8", damage, other_codes=True)[1]) == wrong
    assert steps_in_blocks("mx8", damage)[1]


def test_the_check_also_sees_the_end_of_a_long_tensor(monkeypatch):
    monkeypatch.setattr(check, "SAMPLED", 1 << 10)
    long = many(1, 10_001)
    weights, grads = long.normal(1.0, torch.float32, 0), long.normal(1.0, torch.float32, 1)
    case = Case("sgd", "fp32", "fp32", long)
    expected = check.Expected(case, weights, grads)
    kept = grads[0].clone()
    weights[0].requires_grad_().grad = grads[0]
    optimizer = torch.optim.SGD(weights, **OPTIONS["sgd"])

    def step():
        before = weights[0][-1].item()
        optimizer.step()
        weights[0].data[-1] = before

    assert "wrong" in expected.problem(step, weights, grads, 0.0)
    assert torch.equal(grads[0], kept)


def test_a_missing_provider_gives_the_reason():
    absent = Provider("absent", Library("absent", "no-such-distribution", "no_such_module"), {})
    assert absent.unavailable() == "no-such-distribution is not installed"


def test_provider_names_are_unique_and_match_patterns():
    for device in devices.DEVICES:
        names = [provider.name for provider in providers.all_providers(device)]
        assert len(set(names)) == len(names)
    found = providers.find(providers.all_providers(), "torch-f*,optimi")
    assert [p.name for p in found] == [
        "torch-fused-fp32",
        "torch-fused",
        "torch-foreach",
        "torch-forloop",
        "optimi",
    ]
    with pytest.raises(ValueError, match="no provider nobody"):
        providers.find(found, "nobody")


def test_a_provider_that_does_not_fit_in_memory_is_skipped():
    """Only the first provider fits once the extra memory of the second is known."""

    class Full(devices.Device):
        left = iter([1 << 20, 126, 1 << 20, 124])

        def free(self):
            return next(self.left)

        def extra_memory(self, step):
            return 100  # the benchmark requires 25% more to be free

    chosen = [BY_NAME["torch-fused"], BY_NAME["torch-foreach"]]
    found = timing.run_case(TINY, chosen, samples=1, device=Full())
    assert [one.provider for one in found.timed] == ["torch-fused", "copy", "in-place"]
    assert found.skipped == [("torch-foreach", "does not fit in memory together with the others")]
    assert found.failed == []


def test_bytes_of_the_formats_of_other_libraries():
    case = Case("adamw", "bf16", "mx8", one(1000), "split8")
    moved = {
        "torch-fused-fp32": 28_000,
        "bitsandbytes-8bit": 6_000 + 4 * 1015.625,
        "flashoptim-8bit": 6_000 + 2_000 + 4 * 1062.5,
    }
    for provider in providers.all_providers("cuda"):
        if provider.name in moved:
            assert provider.bytes_in(case) == round(moved.pop(provider.name))
    assert not moved


def test_percentiles():
    assert timing.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert timing.percentile([0.0, 10.0], 20) == 2.0
    assert timing.percentile([7.0], 80) == 7.0


def test_extra_memory_sees_a_temporary():
    source = torch.ones(1 << 22)
    found = devices.DEVICES["cpu"].extra_memory(lambda: source + 1)
    if found is None:
        pytest.skip("the kernel does not tell")
    assert abs(found - source.nbytes) < 1 << 21


def test_end_to_end(tmp_path, capsys):
    """Two runs append lines with the fields in order; the report uses the newer run."""
    out = tmp_path / "results" / "cpu.jsonl"
    arguments = ["--quick", "--cases", "300x1", "--samples", "2", "--out", str(out)]
    arguments += ["--providers", "onepass-cpu,torch-fused"]
    assert main(arguments) == 0
    first = out.read_text()
    assert main(arguments) == 0
    assert out.read_text().startswith(first)
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    names = [line["provider"] for line in lines]
    assert names[len(names) // 2 :] == names[: len(names) // 2]
    for line in lines:
        assert tuple(line) == results.FIELDS
        assert list(line["ms"]) == ["p20", "p50", "p80"]
        assert len(line["samples"]) == 2
        assert line["share"] == pytest.approx(line["gbps"] / line["copy_gbps"], abs=1e-2, rel=1e-2)
        assert (line["host_us"] is None) == (line["provider"] in timing.LIMITS)
        assert line["driver"] is None
        assert line["cuda"] is None
        assert line["tensors"] == 300
    table = capsys.readouterr().out
    assert "targets (AdamW)" in table
    assert "torch-fused" in table

    assert report.main(["--results", str(out.parent), "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "performance.md").read_text()
    assert "cpu.jsonl" in page
    assert "Not measured: any GPU" in page
    own = (tmp_path / "performance" / f"{report.slug(lines[0]['device'])}.md").read_text()
    assert lines[-1]["date"] in own
    assert own.count("| torch-fused |") == 1


def test_missing_measures_only_what_has_no_line(tmp_path, monkeypatch):
    """A provider that does not serve a case never has a line for it."""
    monkeypatch.setitem(
        command.FILES, "cpu", "none.jsonl"
    )  # ignore the committed lines of this processor
    out = tmp_path / "cpu.jsonl"
    arguments = ["--quick", "--cases", "split8", "--samples", "1", "--missing", "--out", str(out)]
    ours, both = (["--providers", names] for names in ("onepass-cpu", "onepass-cpu,torch-fused"))
    assert main([*arguments, *ours]) == 0
    first = out.read_text()
    assert first.count('"onepass-cpu"') == 1
    assert main([*arguments, *both]) == 0
    assert out.read_text() == first
    arguments[2] = "300x1"
    assert main([*arguments, *ours]) == 0
    assert main([*arguments, *both]) == 0
    found = [json.loads(text)["provider"] for text in out.read_text().splitlines()]
    assert found.count("torch-fused") == 1
    assert found.count("onepass-cpu") == 3  # measured again together with torch-fused
    assert main([*arguments, *both]) == 0
    assert len(out.read_text().splitlines()) == len(found)


def fake(provider, p50, date="2026-01-01", **more):
    line = dict.fromkeys(results.FIELDS)
    line |= {"provider": provider, "provider_version": "1", "date": date, "device": "cpu"}
    line |= {"rule": "adamw", "param_dtype": "fp32", "states": "fp32", "list": "50M"}
    line["weights"] = "native"
    line |= {"ms": {"p20": p50, "p50": p50, "p80": p50}, "bytes": 1_400_000_000}
    line["numel"] = 50_000_000
    return {**line, "gbps": 1400 / p50, "copy_gbps": 25.0, "share": 56 / p50, **more}


def test_report_names_slower_cases_and_uses_the_newest_lines(tmp_path):
    old = fake("torch-fused", 99.0, "2025-01-01")
    lines = report.newest([fake("torch-fused", 30.0), fake("onepass-cpu", 33.0), old])
    assert [line["ms"]["p50"] for line in lines] == [30.0, 33.0]
    elsewhere = fake("torch-fused", 20.0, "2026-02-01", device="another")
    assert report.newest([*lines, elsewhere]) == [elsewhere, *lines]  # the newest device first
    page = report.device_page(lines)
    assert "onepass-cpu 33.000 ms, torch-fused 30.000 ms (10.0% more)" in page
    assert "| fp32 no slower than torch fused | 0.909 | 1 | fail |" in page
    assert report_plots.draw(lines, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert not report_plots.draw(lines[:1], tmp_path / "one.png")  # nothing to compare


def test_overview_has_the_time_per_billion_parameters():
    """The library's column, a mark for another run, and archived devices below the others."""
    first = "maker, 2 of 2 threads, avx2"
    lines = [
        fake("onepass-cpu", 30.0, device=first),
        fake("torch-fused", 45.0, device=first),
        fake("bitsandbytes", 300.0, "2025-01-01", device=first),
        fake("onepass-cpu", 90.0, "2024-01-01", device="older, 2 of 2 threads, avx2"),
        fake("onepass-cpu", 90.0, "2024-01-01", device="other, 2 of 2 threads, avx512"),
    ]
    page = report.overview(report.newest(lines), ["cpu.jsonl"])
    assert "| fp32 | **600** | 900 (1.50x) | 6,000† (10.0x) |" in page
    assert "- [maker, 2 of 2 threads, avx2](performance/maker-avx2.md)" in page
    assert "- Archive: [older, 2 of 2 threads, avx2](performance/older-avx2.md)" in page
    assert page.count("- Archive:") == 1


def test_usage_errors(capsys, tmp_path):
    for arguments in (["--cases", "nothing"], ["--samples", "0"], ["--providers", "nobody"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert main(["--list"]) == 0
    assert "adamw/fp32/states-fp32/50M" in capsys.readouterr().out
