"""The compiled ops: schemas, fakes, and refused calls that would access invalid memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import onepass
from onepass.formats import ABSENT
from onepass.rules import CODES, HYPER_WIDTH, OPTIONS_WIDTH

from .cases import same_bits

pytestmark = pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-")

SPEC = [CODES["adam"], 1, 0, 0, 0, 0, 0, 0, 0, ABSENT, ABSENT]


def arguments(n=100):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator)]
    grads = [torch.randn(n, generator=generator)]
    states = [torch.zeros(n), torch.zeros(n)]
    hyper = torch.zeros(1, HYPER_WIDTH)
    hyper[0, :8] = torch.tensor([1.0, 0.01, 0.001, 0.9, 0.1, 0.99, 0.01, 1e-8])
    return params, grads, states, torch.tensor([SPEC]), hyper, torch.tensor([[0, 1]])


def test_opcheck():
    params, grads, states, spec, hyper, counters = arguments()
    torch.library.opcheck(
        torch.ops.onepass.sweep_.default, (params, grads, states, spec, hyper, counters)
    )
    # A plan of fake tensors has only a shape, so only the checks of schemas and fakes apply.
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.onepass.make_plan.default, (params, states, spec), test_utils=some[:2]
    )
    # The address of its handle identifies a plan, so checks that copy arguments do not apply.
    plan = torch.ops.onepass.make_plan(params, states, spec)
    assert torch.ops.onepass.refresh(plan, params, grads) == 0
    torch.library.opcheck(torch.ops.onepass.norm.default, (plan,), test_utils=some[1:2])


def test_every_op_has_a_fake():
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    with FakeTensorMode():
        params, grads, states, spec, hyper, counters = arguments()
        ops = torch.ops.onepass
        assert ops.sweep_(params, grads, states, spec, hyper, counters) is None
        plan = ops.make_plan(params, states, spec)
        assert plan.shape == (1,)
        assert plan.dtype == torch.int64
        assert ops.refresh(plan, params, grads) == 1  # fake tensors have no memory
        assert ops.run(plan, hyper, counters) is None
        found = ops.norm(plan)
        assert (found.shape, found.dtype) == ((3,), torch.float64)
        assert ops.free_plan(plan) is None
        with pytest.raises(DynamicOutputShapeException):  # without symbolic shapes
            ops.take_changes([torch.zeros(1, dtype=torch.int32)], [torch.zeros(3)], False)
        row, verdict = torch.zeros(1), torch.zeros(6, dtype=torch.float64)
        options = torch.zeros(1, OPTIONS_WIDTH, dtype=torch.float64)
        assert ops.judge(verdict, None, None, row, -1.0, False, True) is None
        assert ops.advance(3, options, row.repeat(2), hyper, counters, verdict) is None


def test_judge_and_advance_change_what_their_schemas_say():
    changed = {
        name: [
            a.name
            for a in getattr(torch.ops.onepass, name).default._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        for name in ("judge", "advance")
    }
    assert changed == {"judge": ["verdict"], "advance": ["kept", "hyper", "counters"]}


def test_sweep_is_plan_refresh_run():
    params, grads, states, spec, hyper, counters = arguments()
    torch.ops.onepass.sweep_(params, grads, states, spec, hyper, counters)
    again, _, more, *_ = arguments()
    plan = torch.ops.onepass.make_plan(again, more, spec)
    assert torch.ops.onepass.refresh(plan, again, grads) == 0
    torch.ops.onepass.run(plan, hyper, counters)
    for a, b in zip(params + states, again + more, strict=True):
        assert same_bits(a, b)


def test_a_refresh_serves_one_run():
    params, grads, states, spec, hyper, counters = arguments()
    plan = torch.ops.onepass.make_plan(params, states, spec)
    with pytest.raises(RuntimeError, match="run without refresh"):
        torch.ops.onepass.run(plan, hyper, counters)
    assert torch.ops.onepass.refresh(plan, params, grads) == 0
    torch.ops.onepass.run(plan, hyper, counters)
    with pytest.raises(RuntimeError, match="run without refresh"):
        torch.ops.onepass.run(plan, hyper, counters)
    torch.ops.onepass.free_plan(plan)
    for use in (
        lambda: torch.ops.onepass.refresh(plan, params, grads),
        lambda: torch.ops.onepass.norm(plan),
    ):
        with pytest.raises(RuntimeError, match="has been freed"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s, spec: spec.__setitem__((0, 0), 99), "no rule 99"),
        (lambda p, s, spec: spec.__setitem__((0, 1), 15), "no rule 1 with flags 15"),
        (lambda p, s, spec: spec.__setitem__((0, 5), 77), "no format 77"),
        (lambda p, s, spec: spec.__setitem__((0, 5), 5), "as its format says"),
        (lambda p, s, spec: spec.__setitem__((0, 5), 12), "as its format says"),
        (lambda p, s, spec: spec.__setitem__((0, 7), 77), "no format 77 of states"),
        (lambda p, s, spec: spec.__setitem__((0, 7), 13), "no format 13 of states"),
        (lambda p, s, spec: spec.__setitem__((0, 7), 5), "another shape"),
        (
            lambda p, s, spec: (spec.__setitem__((0, 7), 5), spec.__setitem__((0, 4), 16)),
            "element 16 is inside a block of 32",
        ),
        (lambda p, s, spec: spec.__setitem__((0, 9), 0), "too few states"),
        (lambda p, s, spec: spec.__setitem__((0, 2), -1), "negative row"),
        (lambda p, s, spec: s.append(torch.zeros(100)), "more states than"),
        (lambda p, s, spec: s.__setitem__(0, torch.zeros(99)), "another shape"),
        (lambda p, s, spec: s.__setitem__(0, torch.zeros(100).bfloat16()), "another shape"),
        (lambda p, s, spec: p.__setitem__(0, torch.zeros(100).double()), "must be float32"),
        (lambda p, s, spec: p.append(torch.zeros(3)), "spec must be"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    params, _, states, spec, _, _ = arguments()
    change(params, states, spec)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.onepass.make_plan(params, states, spec)


@pytest.mark.parametrize(
    "bad",
    [
        [torch.zeros(99)],
        [torch.zeros(100).double()],
        [torch.zeros(200)[::2]],
        [],
        [torch.zeros(100)] * 2,
    ],
)
def test_gradients_that_do_not_fit_are_stale(bad):
    params, _, states, spec, hyper, counters = arguments()
    before = params[0].clone()
    plan = torch.ops.onepass.make_plan(params, states, spec)
    assert torch.ops.onepass.refresh(plan, params, bad) == 1
    with pytest.raises(RuntimeError, match="run without refresh"):
        torch.ops.onepass.run(plan, hyper, counters)
    assert torch.equal(params[0], before)
    with pytest.raises(RuntimeError, match="every parameter needs a gradient"):
        torch.ops.onepass.sweep_(params, bad, states, spec, hyper, counters)


def test_tables_that_are_too_small_are_refused():
    params, grads, states, spec, hyper, counters = arguments()
    for h, c in [(hyper[:, :4], counters), (hyper.double(), counters), (hyper, counters[:, :1])]:
        with pytest.raises(RuntimeError, match="must be a contiguous"):
            torch.ops.onepass.sweep_(params, grads, states, spec, h, c)


def test_instruction_sets(every_isa):
    assert "plain" in every_isa
    for name in every_isa:
        assert onepass.ops.cpu_isa(name) == name
        assert onepass.ops.cpu_isa() == name
    assert onepass.ops.cpu_isa("auto") == every_isa[-1]
    with pytest.raises(RuntimeError, match="no instruction set 'mmx'"):
        onepass.ops.cpu_isa("mmx")


def test_the_environment_picks_the_instruction_set_and_the_cuda_library():
    code = "import onepass; print(onepass.ops.cpu_isa(), onepass.ops.CUDA_LIBRARY)"
    env = {**os.environ, "ONEPASS_CPU_ISA": "plain", "ONEPASS_CUDA_LIBRARY": "/nowhere/variant.so"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == "plain /nowhere/variant.so", found.stderr
