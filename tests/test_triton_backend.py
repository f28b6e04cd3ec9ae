"""The host side of the triton backend: availability, tables and the number of launches."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import onepass
from onepass.engine import backends
from onepass.engine.backends import StepArgs
from onepass.engine.backends import triton as host
from onepass.engine.backends.triton import TritonBackend
from onepass.engine.hyper_table import History, RowTable
from onepass.formats.floats import decode_bf16, decode_fp16, encode_bf16, encode_fp16
from onepass.rules import HYPER_WIDTH

from .cases import make_params, set_grads
from .support.thorough import thorough
from .test_reference import NEAR_TIES

try:
    import triton.language as tl  # kernels find it as a global name
except ImportError:
    tl = None

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WHY_NOT = backends.BACKENDS["triton"].unavailable(CPU)
interpreted = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


def param_with_grad(*size):
    param = torch.nn.Parameter(torch.ones(*size))
    param.grad = torch.ones(*size)
    return param


# --- availability ----------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Simulates compiled kernels: Triton 3.6, not interpreted, on an H100."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0+git1"))
    monkeypatch.delitem(sys.modules, host._KERNELS, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(onepass.ops, "cuda_missing", lambda: "left out")


def test_missing_triton_says_what_to_install(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for device in (None, CPU, CUDA):
        assert "pip install 'triton>=3.6'" in TritonBackend().unavailable(device)
    with pytest.raises(RuntimeError, match=r"pip install 'triton>=3.6'.*Backends that can: .*ref"):
        onepass.AdamW([param_with_grad(3)], backend="triton").step()
    assert backends.choose(CUDA).name == "reference"


@pytest.mark.parametrize("version", ["3.5.1", "2.9.0", "3.5.1+rocm6"])
def test_old_triton_says_what_to_install(compiled, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    why_not = TritonBackend().unavailable(CUDA)
    assert f"Triton {version} is too old: pip install 'triton>=3.6'" in why_not
    assert backends.choose(CUDA).name == "reference"


def test_a_cpu_tensor_without_the_interpreter(compiled):
    param = param_with_grad(3)
    optimizer = onepass.AdamW([param], backend="triton")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1.*Backends that can: .*reference"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(param.detach(), torch.ones(3))


def test_cuda_tensors_are_not_interpreted(compiled, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in TritonBackend().unavailable(CUDA)
    assert TritonBackend().unavailable(CPU) == ""


def test_triton_3_6_is_refused_where_it_contracts(compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    why_not = TritonBackend().unavailable(CUDA)
    assert "Triton 3.6 merges fp32 multiplications and additions" in why_not
    assert "pip install 'triton==3.7.*'" in why_not
    assert backends.choose(CUDA).name == "reference"


@pytest.mark.parametrize("version", ["3.7.0", "3.7.1", "3.8.0", "4.0.0"])
def test_other_versions_are_allowed_there_unknown_ones_too(compiled, monkeypatch, version):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert TritonBackend().unavailable(CUDA) == ""


def test_other_devices(compiled):
    assert "CUDA and ROCm" in TritonBackend().unavailable(torch.device("meta"))


def test_none_picks_triton_for_gpus_and_never_for_cpus(compiled, monkeypatch):
    assert backends.choose(CUDA).name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    without_cpu = {n: b for n, b in backends.BACKENDS.items() if n != "cpu"}
    monkeypatch.setattr(backends, "BACKENDS", without_cpu)
    assert backends.choose(CPU).name == "reference"
    assert backends.choose(CPU, "triton").name == "triton"


@interpreted
def test_an_unsupported_dtype_names_what_is_needed():
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16; got torch\.float64"):
        onepass.AdamW([torch.nn.Parameter(torch.ones(3).double())], backend="triton")
    from onepass.formats import STATE_FORMATS
    from onepass.rules import RULES

    strange = replace(STATE_FORMATS["mx4"], name="strange", code=99)
    entry = backends.Entry(torch.ones(3), {0: torch.ones(3)}, strange, 0, RULES["lion"], 1, 0, 0)
    with pytest.raises(ValueError, match=r"code=99.*backend='reference' supports every format"):
        backends.BACKENDS["triton"].prepare([entry])


def test_every_rule_and_format_has_a_kernel():
    pytest.importorskip("triton")
    from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
    from onepass.rules import RULES
    from onepass.triton_kernels import formats, rules

    assert all(rules.update_of(rule) and rules.derive_of(rule) for rule in RULES.values())
    weights = {code for form in WEIGHT_FORMATS.values() for code in form.codes.values()}
    states = {form.code for form in STATE_FORMATS.values()}
    assert {*formats.FORMATS, *formats.MOMENT_FORMATS} == weights | states
    assert weights <= set(formats.FORMATS)


# --- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 3, (1 << 32) - 10, (1 << 32) - 8192, (5 << 32) - 8193])
@pytest.mark.parametrize("numel", [0, 1, 8191, 8192, 8193, 30000])
def test_chunks_cover_an_entry_once_and_cross_no_multiple_of_2_to_the_32(numel, first):
    cuts = host._cuts(numel, first, 8192)
    assert cuts[-1] == numel
    if numel:
        assert cuts[0] == 0
        assert (np.diff(cuts) > 0).all()
        assert (np.diff(cuts) <= 8192).all()
        assert ((first + cuts[:-1]) >> 32 == (first + cuts[1:] - 1) >> 32).all()


def test_chunks_of_a_tensor_beyond_2_to_the_32_start_at_multiples_of_their_size():
    """A 2^32 boundary inside an entry adds one cut; the chunks after it stay aligned."""
    cuts = host._cuts((1 << 32) + 100_000, 5, 8192)
    assert (1 << 32) - 5 in cuts
    assert (cuts[:-1] % 8192 != 0).sum() == 1


@interpreted
def test_run_without_refresh_is_refused():
    params = [param_with_grad(3)]
    optimizer = onepass.AdamW(params, backend="triton")
    optimizer.step()
    (part,) = optimizer._plan._parts
    step = StepArgs(torch.zeros(1, HYPER_WIDTH), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.backend.run(part.prepared, step)


@interpreted
def test_a_stale_plan_is_refused_and_nothing_is_changed():
    params = make_params([(5,), (4, 3)], torch.float32, 0)
    set_grads(params, torch.float32, 0)
    optimizer = onepass.AdamW(params, backend="triton")
    optimizer.step()
    (part,) = optimizer._plan._parts
    good = [p.grad for p in params]
    wrong = [
        good[:1],
        [good[0], good[1].t()],
        [good[0], good[1].t().contiguous().t()],
        [good[0].double(), good[1]],
        [good[0].to_sparse(), good[1]],
        [good[0].to("meta"), good[1]],
        [good[0][:3], good[1]],
    ]
    for grads in wrong:
        assert not part.backend.refresh(part.prepared, params, grads)
    assert part.backend.refresh(part.prepared, params, good)
    assert part.backend.refresh(part.prepared, params, [good[0].to(torch.bfloat16), good[1]])


@interpreted
def test_a_table_of_gradients_that_a_captured_step_reads_is_not_written_again():
    param = param_with_grad(3)
    optimizer = onepass.SGD([param], lr=0.5, backend="triton")
    optimizer.step()
    (part,) = optimizer._plan._parts
    prepared = part.prepared
    prepared.captured = True  # set by a graph capture, which needs a GPU
    table, address = prepared.grads, param.grad.data_ptr()
    optimizer.step()
    assert prepared.grads is table
    old, param.grad = param.grad, torch.ones(3)
    optimizer.step()
    assert old.data_ptr() == address == int(table)
    assert int(prepared.grads) == param.grad.data_ptr()
    assert torch.equal(param.detach(), torch.full((3,), -0.5))
    assert not prepared.captured


def test_options_are_uploaded_again_beside_a_graph_that_copies_its_own():
    param = param_with_grad(3)
    (group,) = onepass.SGD([param], lr=0.5, seed=4).param_groups
    table = RowTable(onepass.SGD.rule, [(group, History(0.0, True))], CPU)
    table.upload()
    known = table.options.clone()
    table.options.zero_()
    table.upload()
    assert not table.options.any()  # the options have not changed, so they are not uploaded
    table._captured.append(known)  # set by a graph capture, which needs a GPU
    table.counters.zero_()
    table.upload()
    assert torch.equal(table.options, known)
    assert table.counters[0, 0] == 4


# --- launches --------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("count", [300, 3_000, pytest.param(20_000, marks=thorough)])
def test_a_step_is_one_launch_beside_that_of_its_hyperparameters(count, monkeypatch):
    """Counts the launches of Triton. Interpreting 20,000 programs would take minutes, so only the
    first case runs; the others compare the grid with the number of tensors (one chunk each)."""
    from triton.runtime.interpreter import GridExecutor

    grids = []
    original = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        grids.append(self.grid)
        if count == 300 or self.grid == (2,):
            original(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    half = count // 2
    params = [torch.nn.Parameter(torch.ones(1 + i % 3)) for i in range(half)]
    params += [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(half)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.1, "nesterov": True}]
    optimizer = onepass.SGD(groups, lr=0.5, momentum=0.9, backend="triton")
    optimizer.step()
    assert grids == [(len(groups),), (count,)]
    if count == 300:
        assert all(bool((p != 1).all()) for p in params)


# --- codes -----------------------------------------------------------------------------------


@interpreted
def test_codes_of_both_16_bit_formats():
    """Encoding and decoding of bf16 and fp16 for every rounding decision, without a rule."""
    import triton

    from onepass.triton_kernels import formats

    kernel = triton.jit(_round_trip)
    block = 1 << 17
    values = np.zeros(-(-len(NEAR_TIES) // block) * block, np.float32)
    values[: len(NEAR_TIES)] = NEAR_TIES
    for format_, encode, decode in (
        (formats.FORMATS[1], encode_bf16, decode_bf16),
        (formats.FORMATS[2], encode_fp16, decode_fp16),
    ):
        assert format_.element == triton.language.uint16
        source, decoded = torch.from_numpy(values.copy()), torch.empty(len(values))
        codes = torch.empty(len(values), dtype=torch.int16)
        with np.errstate(all="ignore"):
            kernel[(len(values) // block,)](source, codes, decoded, FORMAT=format_, BLOCK=block)
            expected = encode(values)
            numbers = decode(expected)
        nan = np.isnan(values)
        np.testing.assert_array_equal(codes.numpy().view(np.uint16)[~nan], expected[~nan])
        np.testing.assert_array_equal(decoded.numpy(), numbers)


def _round_trip(source_ptr, codes_ptr, decoded_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words, _ = FORMAT.encode(tl.load(source_ptr + offsets), 0, 0, 0)
    codes = (words >> 16).to(tl.uint16)
    tl.store(codes_ptr + offsets, codes.to(tl.int16, bitcast=True))
    tl.store(decoded_ptr + offsets, FORMAT.decode(codes.to(tl.uint32) << 16, 0, 0, 0))
