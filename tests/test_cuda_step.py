"""What comes before a CUDA sweep, and what a sweep does beside the rule, against the reference: the
sources compiled by g++ as in test_cuda_shim.py."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS, Policy, StepArgs, StepSwitches
from onepass.engine.hyper_table import History, RowTable
from onepass.formats import STATE_FORMATS
from onepass.numerics.verdict import SKIPPED, VERDICT_WIDTH
from onepass.rules import RULES

from . import cuda_shim
from .cases import CASES, DTYPES, SIZES, advance, assert_same, history, make_params
from .cases import same_bits as same_bits
from .test_cuda_shim import SHIM, STORED, WHY_NOT

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _shim(monkeypatch):
    monkeypatch.setitem(BACKENDS, SHIM, cuda_shim.ShimBackend())


def same_doubles(a, b):
    words = a.view(torch.int64) == b.view(torch.int64)
    return bool((words | (a.isnan() & b.isnan())).all())


# --- advance ---------------------------------------------------------------------------------

STEPS = [1, 2, 3, 1000, (1 << 24) - 1]
OWN = {
    "sgd": [{"momentum": m, "dampening": d} for m in (0.0, 0.9) for d in (0.0, 0.3)],
    "adagrad": [{"lr_decay": d, "eps": 1e-10} for d in (0.0, 0.01, 1 / 3)],
    "rmsprop": [{"alpha": a, "eps": 1e-8, "momentum": 0.9} for a in (0.0, 0.99, 1 / 3)],
    "adam": [
        {"betas": betas, "eps": eps}
        for betas in ((0.9, 0.999), (0.0, 0.95), (1 / 3, 0.99999), (0.5, 1 - 2**-53))
        for eps in (1e-8, 0.0, 1e-30)
    ],
    "lion": [{"betas": betas} for betas in ((0.9, 0.99), (0.0, 1 / 3))],
}
"""Values of the rules' own options; a rule that is not here takes those of adam that it has."""
DEFAULTS = {case.ours.rule.name: case.ours([torch.nn.Parameter(torch.ones(1))]) for case in CASES}


def groups_of(rule):
    defaults = DEFAULTS[rule].defaults
    for own, decoupled, maximize, decay, ema in itertools.product(
        OWN.get(rule, OWN["adam"]), (False, True), (False, True), (0.0, 0.1), (None, 0.999)
    ):
        yield {
            **defaults,
            **{name: value for name, value in own.items() if name in defaults},
            "lr": 0.3 if maximize else 1e-3,
            "weight_decay": decay,
            "decoupled_weight_decay": decoupled,
            "maximize": maximize,
            "ema_decay": ema,
            "seed": (1 << 62) + 5 if decoupled else 7,
        }


def table_of(rule):
    rows = [
        (group, history(RULES[rule], step - 1, first))
        for group, step, first in itertools.product(groups_of(rule), STEPS, (False, True))
    ]
    return RowTable(RULES[rule], rows, torch.device("cpu"))


def assert_same_tables(a, b):
    for name in ("steps", "fresh", "hyper"):
        assert same_bits(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.counters, b.counters)


@pytest.mark.parametrize("factor", [None, 1.0, 1 / 3, 1e-30, 0.0, INF, NAN])
@pytest.mark.parametrize("rule", RULES)
def test_advance_derives_the_hyperparameters_of_the_host(rule, factor):
    """More rows than a block has threads; two steps, the second from what the first has left."""
    ours, reference = table_of(rule), table_of(rule)
    verdict = None
    if factor is not None:
        verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
        verdict[0] = factor
    for _ in range(2):
        advance(BACKENDS[SHIM], ours, verdict)
        advance(BACKENDS["reference"], reference, verdict)
        assert_same_tables(ours, reference)
    assert len(ours.rows) > 256
    assert not ours.fresh.any()


def test_advance_counts_no_step_that_is_skipped():
    ours, reference = table_of("adam"), table_of("adam")
    verdict = torch.tensor([0.5, 0.0, 0, 0, 0, 1], dtype=torch.float64)
    for skip in (1.0, 0.0, 1.0):
        verdict[1] = skip
        before = [t.clone() for t in (ours.steps, ours.fresh, ours.hyper)]
        for name, table in ((SHIM, ours), ("reference", reference)):
            advance(BACKENDS[name], table, verdict)
        now = (ours.steps, ours.fresh, ours.hyper)
        same = [same_bits(a, b) for a, b in zip(before, now, strict=True)]
        assert same == ([True] * 3 if skip else [False] * 3)
        assert bool((ours.counters[:, 1] == 0).all()) == bool(skip)
        for name in ("steps", "fresh", "hyper"):
            assert same_bits(getattr(ours, name), getattr(reference, name))
        assert torch.equal(ours.counters[:, 1], reference.counters[:, 1])


@pytest.mark.parametrize("name", ["reference", SHIM])
def test_retreat_takes_back_what_advance_has_counted(name):
    """Of rows that count, whatever torch's defaults are; skipped rows are left alone."""
    backend, table = BACKENDS[name], table_of("sgd")
    before = [t.clone() for t in (table.steps, table.fresh)]
    assert 0 < table.fresh.sum() < len(table.rows)
    skip = torch.tensor([1.0, 1.0, 0, 0, 0, 1], dtype=torch.float64)
    for verdict in (None, skip):
        advance(backend, table, verdict)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                backend.retreat(table, before[1])
        finally:
            torch.set_default_dtype(dtype)
        assert same_bits(table.steps, before[0])
        assert same_bits(table.fresh, before[1])
    # The rows' own tensors, which optimizer states share.
    assert [float(row.step) for row in table.rows] == before[0].tolist()


@pytest.mark.parametrize("name", ["reference", SHIM])
def test_retreat_from_a_table_of_rows_that_count_and_rows_that_do_not(name):
    backend, table = BACKENDS[name], table_of("adam")
    advance(backend, table, None)
    table.counters[::2, 1] = 0
    after, fresh = table.steps.clone(), torch.rand(len(table.rows))
    backend.retreat(table, fresh)
    assert same_bits(table.steps[::2], after[::2])
    assert same_bits(table.steps[1::2], after[1::2] - 1)
    assert same_bits(table.fresh, fresh)


@pytest.mark.parametrize("name", ["reference", SHIM])
def test_retreat_at_the_largest_count_of_fp32(name):
    table = RowTable(
        RULES["lion"], [(next(groups_of("lion")), History(2.0**24, False))], torch.device("cpu")
    )
    advance(BACKENDS[name], table, None)
    assert float(table.steps) == 2.0**24
    BACKENDS[name].retreat(table, table.kept[1:].clone())
    assert float(table.steps) == 2.0**24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: setattr(t, "options", t.options.float()),
            "options must be a contiguous float64",
        ),
        (lambda t: setattr(t, "hyper", t.hyper[:, :8]), "hyper must be a contiguous float32"),
        (lambda t: setattr(t, "counters", t.counters[:-1]), "counters must be a contiguous int64"),
        (lambda t: setattr(t, "kept", t.kept[:1]), "kept must be a contiguous float32"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, message):
    table = table_of("sgd")
    table.upload()
    change(table)
    table.upload = lambda: None
    with pytest.raises(RuntimeError, match=message):
        advance(BACKENDS[SHIM], table, None)


# --- judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        None,
        [0.0, 0.0, 0.0],
        [9.0, 2.0, 0.0],
        [1e-20, 1e-10, 0.0],
        [3e300, 1e38, 0.0],
        [INF, INF, 2.0],
        [NAN, 3.0, 1.0],
    ],
)
def test_judge_finds_the_verdict_of_the_host(found):
    policies = [
        Policy(most, largest, skip)
        for most, largest, skip in itertools.product(
            (None, 0.0, 1.0, 1 / 3, 1e30), (False, True), (False, True)
        )
    ]
    scales = [None, 1.0, 65536.0, 1 / 3, 0.0, INF, NAN]
    ours, reference = (torch.zeros(VERDICT_WIDTH, dtype=torch.float64) for _ in range(2))
    for policy, scale, inf in itertools.product(policies, scales, (None, 0.0, 1.0, NAN)):
        for name, verdict in ((SHIM, ours), ("reference", reference)):
            BACKENDS[name].judge(
                verdict,
                None if found is None else torch.tensor(found, dtype=torch.float64),
                None if scale is None else torch.tensor(scale),
                None if inf is None else torch.tensor(inf),
                policy,
            )
        assert same_doubles(ours, reference), (policy, scale, inf, ours, reference)
    assert ours[SKIPPED] > 0


def test_a_verdict_that_does_not_fit_is_refused():
    verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
    for wrong in (
        (verdict[:5], None, None, None),
        (verdict, verdict[:2], None, None),
        (verdict, None, torch.ones((), dtype=torch.float16), None),
        (verdict, None, None, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="must be a contiguous"):
            BACKENDS[SHIM].judge(*wrong, Policy())


# --- the sweep -------------------------------------------------------------------------------


def mixed(backend, sizes, offset=0, **options):
    """Every format in one list; the gradients are slices, one number from the next."""
    groups, params, storages = [], [], []
    for i, (dtype, weights, states) in enumerate(STORED):
        made = make_params([sizes[(i + j) % len(sizes)] for j in range(2)], dtype, seed=i)
        groups.append({"params": made, "states": states, "weights": weights})
        params += made
    for i, param in enumerate(params):
        dtype = DTYPES[i % 3]
        storage = torch.full((param.numel() + 2 * offset + 1,), 0.5).to(dtype)
        generator = torch.Generator().manual_seed(i)
        inside = storage[offset : offset + param.numel()]
        inside.copy_(torch.randint(-8, 9, inside.shape, generator=generator))
        if dtype != param.dtype:
            param.grad_dtype = None
        param.grad = inside.view_as(param)
        storages.append(storage)
    return params, storages, onepass.AdamW(groups, lr=0.1, amsgrad=True, backend=backend, **options)


LARGE = [*SIZES, (2085,), (16384 + 300,)]


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("skipped", [False, True])
def test_gradients_are_zeroed_and_nothing_beside_them(offset, skipped):
    made = []
    for backend in ("reference", SHIM):
        _, storages, optimizer = mixed(backend, LARGE, offset, zero_grads=True)
        if skipped:
            optimizer.found_inf = torch.ones(())
        optimizer.step()
        made.append((storages, optimizer))
    assert_same(made[0][1], made[1][1])
    for a, b in zip(made[0][0], made[1][0], strict=True):
        assert same_bits(a, b)
        inside = b[offset : len(b) - offset - 1]
        assert not inside.any()
        assert bool((b[:offset] == 0.5).all())
        assert bool((b[len(b) - offset - 1 :] == 0.5).all())


def test_rows_of_step_0_are_left_alone_beside_others_that_are_not():
    """The gradients too, unless they are to be zeroed."""
    for zero in (False, True):
        made = []
        for backend in ("reference", SHIM):
            params, storages, optimizer = mixed(backend, LARGE)
            optimizer.step()
            kept = [
                [t.clone() for t in (p.detach(), p.grad, *tensors_of(optimizer, p))] for p in params
            ]
            plan = optimizer.adopted()
            (part,) = plan._parts
            advance(part.backend, part.table, None)
            part.table.counters[::2, 1] = 0
            table = part.table
            part.backend.run(
                part.prepared, StepArgs(table.hyper, table.counters, None, StepSwitches(zero))
            )
            made.append((params, storages, optimizer))
        assert_same(made[0][2], made[1][2])
        for a, b in zip(made[0][1], made[1][1], strict=True):
            assert same_bits(a, b)
        for i, (param, before) in enumerate(zip(params, kept, strict=True)):
            now = (param.detach(), param.grad, *tensors_of(optimizer, param))
            same = [same_bits(a, b) for a, b in zip(before, now, strict=True)]
            alone = i // 2 % 2 == 0
            if alone:
                assert all([same[0], *same[2:]])
            elif param.numel() > 31:
                assert not same[0]
            assert not zero or not param.grad.any()


def tensors_of(optimizer, param):
    state = optimizer.state[param]
    return [v for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"]


def test_averages_and_telemetry_are_refused():
    param = make_params([(5,)], torch.float32, 0)[0]
    param.grad = torch.ones(5)
    for option in ({"ema_decay": 0.9}, {"telemetry": True}):
        with pytest.raises(RuntimeError, match="neither ema_decay nor telemetry"):
            onepass.SGD([param], backend=SHIM, **option).step()
    entry = onepass.backends.Entry(
        param.detach(), {}, STATE_FORMATS["fp32"], 0, RULES["sgd"], 0, 0, 0, ema=torch.zeros(5)
    )
    with pytest.raises(RuntimeError, match=r"does not support ema_decay.*\(parameter 0\)"):
        BACKENDS[SHIM].prepare([entry])
    optimizer = onepass.SGD([param], backend=SHIM)
    (part,) = optimizer.adopted()._parts
    with pytest.raises(RuntimeError, match="does not support telemetry"):
        part.backend.run(
            part.prepared,
            StepArgs(part.table.hyper, part.table.counters, torch.zeros(1, 4, dtype=torch.float64)),
        )


# --- whole steps -----------------------------------------------------------------------------


def whole_steps(backend, case, options, gradients, **settings):
    params = make_params([(33,), (2085,), (4, 5)], torch.float32, 1)
    optimizer = case.ours(params, **options, backend=backend, seed=3)
    found = []
    for seed, broken in enumerate(gradients):
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            # Whole numbers, whose squares add up without rounding in any order.
            param.grad = torch.randint(-9, 10, param.shape, generator=generator).float()
        if broken is not None:
            params[1].grad[100] = broken
        for name, value in settings.items():
            setattr(optimizer, name, value(seed))
        optimizer.step()
        numbers = [optimizer.grad_norm, optimizer.skipped_steps, *(p.grad for p in params)]
        found.append([torch.zeros(1) if n is None else n.float() for n in numbers])
    return optimizer, found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"max_grad_norm": 3.0}, {}),
        ({"max_grad_norm": 3.0, "norm_type": INF, "skip_nonfinite": True}, {}),
        ({"skip_nonfinite": True, "zero_grads": True}, {}),
        (
            {"max_grad_norm": 0.7, "skip_nonfinite": True},
            {"grad_scale": lambda i: torch.tensor(8.0)},
        ),
        (
            {"zero_grads": True},
            {
                "grad_scale": lambda i: torch.tensor(2.0**i),
                "found_inf": lambda i: torch.tensor(float(i % 2 == 0)),
            },
        ),
    ],
)
def test_whole_steps_judge_advance_and_sweep_as_the_reference(case, options, settings):
    """The first step is skipped where a broken gradient is: SGD's buffer begins at the second."""
    variant = {**case.variants().__next__(), **options, "states": "bf16"}
    if case.name == "sgd":
        variant.update(momentum=0.9, dampening=0.25)
    gradients = [INF, None, NAN, None, None]
    if "skip_nonfinite" not in options:
        gradients = [None] * 5
    results = [whole_steps(b, case, variant, gradients, **settings) for b in ("reference", SHIM)]
    assert_same(results[0][0], results[1][0])
    for ours, reference in zip(results[1][1], results[0][1], strict=True):
        for a, b in zip(ours, reference, strict=True):
            assert same_bits(a, b)
    step = next(iter(results[1][0].state.values()))["step"]
    skipped = 2 if "skip_nonfinite" in options else 3 if "found_inf" in settings else 0
    assert float(step) == 5 - skipped
