"""The triton backend's verdicts, hyperparameters, and what a step may do beside the rule: those of
the reference, interpreted on CPU tensors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS, Policy, StepArgs, StepSwitches
from onepass.engine.hyper_table import NONFINITE, RowTable
from onepass.numerics.gradient_norm import norm
from onepass.numerics.verdict import FACTOR, SKIP, SKIPPED, VERDICT_WIDTH

from .cases import CASES, advance, assert_same, history, make_params, same_bits, set_grads

pytest.importorskip("triton")

CPU = torch.device("cpu")
REFERENCE, TRITON = BACKENDS["reference"], BACKENDS["triton"]
WHY_NOT = TRITON.unavailable(CPU)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


def same_float64(a, b):
    """Equal bit for bit, two NaNs counting as equal."""
    equal = a.view(torch.int64) == b.view(torch.int64)
    return bool((equal | (a.isnan() & b.isnan())).all())


# --- verdicts and hyperparameters ------------------------------------------------------------

INF, NAN = math.inf, math.nan
FOUND = [None, (0.0, 0.0, 0.0), (1e-3, 0.02, 0.0), (7.3e40, 1e20, 0.0), (INF, INF, 2), (NAN, 3, 1)]


@pytest.mark.parametrize("found", FOUND, ids=str)
def test_a_verdict_is_the_references(found):
    def number(value):
        return None if value is None else torch.tensor(float(value))

    measured = None if found is None else torch.tensor(found, dtype=torch.float64)
    policies = [
        Policy(most, largest, skips)
        for most in ((None,) if found is None else (None, 0.0, 0.1, 1, 1e300))
        for largest, skips in ((False, False), (True, False), (False, True))
    ]
    for scale, inf, policy in itertools.product(
        (None, 1024.0, 0.3, 0.0, INF), (None, 0.0, 1.0, NAN), policies
    ):
        verdicts = []
        for backend in (REFERENCE, TRITON):
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
            verdict[SKIPPED] = 41
            backend.judge(verdict, measured, number(scale), number(inf), policy)
            verdicts.append(verdict)
        assert same_float64(*verdicts), (scale, inf, policy)
        assert verdicts[1][SKIPPED] == 41 + verdicts[1][SKIP]


STEPS = [0, 1, 2, 999, (1 << 24) - 2, 1 << 24]
NUMBERS = [
    {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "ema_decay": 0.999, "seed": 5},
    {"lr": 0.3, "weight_decay": 0.1, "betas": (0.0, 0.9999999), "dampening": 0.3, "eps": 0.07},
    {"lr": 0.0, "betas": (0.95, 0.0), "eps": 1e-300, "lr_decay": 1e-4, "alpha": 0.7},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_hyperparameters_are_the_hosts(case):
    """Every option, history and number in one table; what they are after the step too."""
    groups = []
    for variant, numbers in itertools.product(case.variants(), NUMBERS):
        (group,) = case.ours([torch.nn.Parameter(torch.ones(1))], **variant).param_groups
        groups.append({**group, **{k: v for k, v in numbers.items() if k in group}})
    rows = [
        (group, history(case.ours.rule, STEPS[(i + j) % len(STEPS)], j % 2 == 0))
        for i, group in enumerate(groups)
        for j in range(2)
    ]
    assert {row[1].steps for row in rows} == set(STEPS)
    tables = [RowTable(RULES_OF[case.name], rows, CPU) for _ in range(2)]
    verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
    for judged in (None, (0.1, 0.0), (0.7, 1.0), (NAN, 0.0), (1 / 3, 0.0)):
        if judged is not None:
            verdict[FACTOR], verdict[SKIP] = judged
        for backend, table in zip((REFERENCE, TRITON), tables, strict=True):
            before = [t.clone() for t in (table.hyper, table.steps, table.fresh)]
            advance(backend, table, None if judged is None else verdict)
            if judged is not None and judged[1]:
                after = (table.hyper, table.steps, table.fresh)
                assert all(map(torch.equal, before, after))
                assert not table.counters[:, 1].any()
        expected, table = tables
        assert same_bits(table.hyper, expected.hyper)
        assert torch.equal(table.counters, expected.counters)
        assert torch.equal(table.steps, expected.steps)
        assert torch.equal(table.fresh, expected.fresh)
        for group in groups:
            group["lr"] += 0.01


RULES_OF = {case.name: case.ours.rule for case in CASES}


def test_rules_have_the_same_derive():
    from onepass.triton_kernels import rules

    assert all(rules.derive_of(rule.name) for rule in RULES_OF.values())


# --- zeroed gradients, averages, telemetry, rows left alone ----------------------------------

# Of what is written beside weights, and how: states, weights, dtype, gradients' dtype, ema_decay.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GROUPS = [
    ("fp32", "native", FP32, FP32, 0.9),
    ("bf16", "stochastic", BF16, BF16, 0.99),
    ("mx8", "split8", BF16, BF16, 0.5),
    ("mx8", "native", BF16, BF16, None),
    ("bf16", "kahan", BF16, FP32, 0.9),
    ("mx4", "master", BF16, BF16, 0.9),
    ("fp32", "split16", BF16, BF16, None),
    ("bf16", "kahan", FP16, FP16, 0.0),
]
SHAPES = [(33,), (2049,), (7, 37)]


def build(backend, numbers, first, **options):
    """A group each of these numbers, whose first parameter is a slice from first on."""
    groups, dtypes = [], []
    for number in numbers:
        states, weights, dtype, grad_dtype, decay = GROUPS[number]
        odd, *others = make_params([(1030 + first,), *SHAPES], dtype, seed=number)
        params = [odd.detach()[first:].requires_grad_(), *others]
        made = {"params": params, "states": states, "weights": weights, "ema_decay": decay}
        groups.append(made)
        dtypes += [grad_dtype] * len(params)
    optimizer = onepass.AdamW(groups, lr=0.01, backend=backend, seed=7, **options)
    return optimizer, dtypes


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_grads(optimizer, dtypes, step, at=(), value=NAN):
    """Fresh gradients; those of the parameters named by at have one element of this value."""
    for i, (param, dtype) in enumerate(zip(params_of(optimizer), dtypes, strict=True)):
        set_grads([param], dtype, seed=1000 * step + i)
        if i in at:
            param.grad.view(-1)[param.numel() // 2] = value


def swept(backend, numbers, first, alone, zero_grads, measured):
    """Two steps through the backend's own run, the second with some of the rows left alone."""
    optimizer, dtypes = build(backend, numbers, first)
    for step in range(2):
        take_grads(optimizer, dtypes, step, at=range(0, len(dtypes), 3) if measured else ())
        (part,) = optimizer.adopted()._parts
        table = part.table
        table.telemetry = torch.full((len(table.rows), 4), -1.0).double() if measured else None
        advance(part.backend, table, None)
        if step:
            table.counters[alone, 1] = 0
        step = StepArgs(table.hyper, table.counters, table.telemetry, StepSwitches(zero_grads))
        part.backend.run(part.prepared, step)
    return optimizer, table.telemetry


# Squares of eight elements at most are rounded and added in fp32, all else in float64.
TELEMETRY = {"rtol": 9 * 2.0**-24, "atol": 0.0}


@pytest.mark.parametrize(
    ("numbers", "first", "alone", "zero_grads", "measured"),
    [
        (range(8), 0, [], True, False),
        (range(8), 1, [1, 2, 5], False, True),
        ([1, 2, 3], 0, [0, 2], True, True),
        ([0], 0, [], False, True),
        ([0, 4], 1, [0], False, False),
        ([3], 0, [0], True, False),
    ],
)
def test_what_a_sweep_may_do_beside_the_rule(numbers, first, alone, zero_grads, measured):
    asked = (list(numbers), first, alone, zero_grads, measured)
    (expected, sums), (optimizer, found) = (swept(b, *asked) for b in ("reference", "triton"))
    assert_same(optimizer, expected)
    grads = [(p.grad, q.grad) for p, q in zip(*map(params_of, (optimizer, expected)), strict=True)]
    assert all(same_bits(*pair) for pair in grads)
    assert all(bool((grad == 0).all()) for grad, _ in grads) == zero_grads
    if measured:
        assert torch.equal(found[:, NONFINITE], sums[:, NONFINITE])
        assert bool((sums[:, NONFINITE] > 0).any())
        torch.testing.assert_close(found, sums, **TELEMETRY, equal_nan=True)


@pytest.mark.parametrize(("numbers", "zero_grads"), [((1, 2, 5), False), ((0, 3, 4, 7), True)])
def test_a_skipped_step_changes_nothing(numbers, zero_grads):
    optimizer, dtypes = build(
        "triton", numbers, 1, skip_nonfinite=True, zero_grads=zero_grads, telemetry=True
    )
    take_grads(optimizer, dtypes, 0)
    optimizer.step()
    tensors = params_of(optimizer)
    tensors = [*tensors, *(t for p in tensors for t in optimizer.state[p].values())]
    before = [t.detach().clone() for t in tensors]
    take_grads(optimizer, dtypes, 1, at=[9], value=INF)
    optimizer.step()
    assert all(same_bits(t.detach(), kept) for t, kept in zip(tensors, before, strict=True))
    assert optimizer.skipped_steps == 1
    assert all(bool((p.grad == 0).all()) == zero_grads for p in params_of(optimizer))
    assert all(found["update_norm"] == 0 for found in optimizer.telemetry)
    assert [int(found["nonfinite"]) for found in optimizer.telemetry][:3] == [0, 0, 1]


def test_telemetry_of_empty_parameters_is_zero():
    param = torch.nn.Parameter(torch.ones(0))
    param.grad = torch.ones(0)
    optimizer = onepass.SGD([param], backend="triton", telemetry=True)
    optimizer.step()
    (found,) = optimizer.telemetry
    assert not any(map(bool, found.values()))


def test_telemetry_beyond_the_range_of_squares_in_fp32():
    param = torch.nn.Parameter(torch.tensor([3e25, 4e25, 1e-30]))
    param.grad = torch.tensor([3e-30, 4e-30, 0.0])
    optimizer = onepass.SGD([param], lr=0.0, backend="triton", telemetry=True)
    optimizer.step()
    (found,) = optimizer.telemetry
    for name, value in (("grad_norm", 5e-30), ("weight_norm", 5e25), ("update_norm", 0.0)):
        # The inputs are rounded to fp32 too.
        assert float(found[name]) == pytest.approx(value, rel=10 * 2.0**-24)


# --- whole steps -----------------------------------------------------------------------------


def both(change, steps=5, cls=onepass.AdamW, **options):
    """A few steps on both backends; change(optimizer, step) is called before each."""
    found = []
    for backend in ("reference", "triton"):
        params = make_params(SHAPES, FP32, seed=1)
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02, "seed": 3}]
        optimizer = cls(groups, **{"lr": 0.01, "backend": backend, **options})
        for step in range(steps):
            set_grads(params, FP32, seed=step)
            change(optimizer, step)
            optimizer.step()
        found.append(optimizer)
    assert_same(*found)
    return found


def poison(optimizer, step, steps=(0, 2)):
    if step in steps:
        params_of(optimizer)[1].grad[17] = INF if step else NAN


@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_clipping_to_the_largest_magnitude(states):
    options = {"max_grad_norm": 0.5, "norm_type": INF, "states": states}

    def change(optimizer, step):
        optimizer.max_grad_norm = 0.5 / (1 + step)
        poison(optimizer, step, (3,))

    expected, optimizer = both(change, **options, skip_nonfinite=True, weight_decay=0.1)
    assert optimizer.skipped_steps == expected.skipped_steps == 1
    assert optimizer.grad_norm == expected.grad_norm > 0.5


def test_clipping_with_one_value_of_the_norm():
    """Sums of squares differ between backends in their last bits: both are given one here."""

    def change(optimizer, step):
        grads = [p.grad.numpy().ravel() for p in params_of(optimizer)]
        optimizer._found = torch.from_numpy(norm(grads))

    both(change, max_grad_norm=0.5, cls=onepass.SGD, momentum=0.9)


def test_clipping_with_the_norm_of_its_own():
    """The sum of squares is within 9 * 2^-24 of its value, so the norm within half of that."""
    lr, norms, weights = 0.1, [], []
    for backend in ("reference", "triton"):
        params = make_params(SHAPES, FP32, seed=1)
        optimizer = onepass.SGD(params, lr=lr, backend=backend, max_grad_norm=0.5)
        set_grads(params, FP32, seed=0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        weights.append(params)
    assert norms[1] > 0.5
    # grad_norm is rounded to fp32 on both sides.
    torch.testing.assert_close(norms[1], norms[0], rtol=(4.5 + 2) * 2.0**-24, atol=0.0)
    for p, q in zip(*weights, strict=True):
        # Besides the factor itself: it, its product with the gradient and that with lr are rounded.
        update = lr * 0.5 / norms[0] * q.grad.abs()
        bound = (4.5 + 2 * 3) * 2.0**-24 * update + 2 * 2.0**-24 * q.abs()
        assert bool(((p - q).abs() <= bound).all())


@pytest.mark.parametrize("states", ["bf16", "dynamic8"])
def test_nonfinite_steps_are_skipped(states):
    def change(optimizer, step):
        poison(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
            group["betas"] = (0.9, 0.99 + 1e-3 * step)

    expected, optimizer = both(change, skip_nonfinite=True, states=states)
    assert optimizer.skipped_steps == expected.skipped_steps == 2
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_dampening_begins_after_a_first_step_that_was_skipped():
    options = {"momentum": 0.9, "dampening": 0.25, "skip_nonfinite": True}
    _, optimizer = both(poison, cls=onepass.SGD, **options)
    plain = [torch.nn.Parameter(p.detach()) for p in make_params(SHAPES, FP32, seed=1)]
    groups = [{"params": plain[:1]}, {"params": plain[1:], "lr": 0.02}]
    unskipped = onepass.SGD(groups, lr=0.01, backend="reference", momentum=0.9, dampening=0.25)
    for step in (1, 3, 4):
        set_grads(plain, FP32, seed=step)
        unskipped.step()
    assert_same(optimizer, unskipped)


@pytest.mark.parametrize("clips", [None, 0.5])
def test_a_grad_scaler_unscales_and_skips(clips):
    def change(optimizer, step):
        optimizer.grad_scale = torch.tensor(1024.0 * (step + 1))
        optimizer.found_inf = torch.tensor(float(step == 1))
        for p in params_of(optimizer):
            p.grad *= 1024 * (step + 1)

    norm = {"max_grad_norm": clips, "norm_type": INF, "telemetry": True}
    expected, optimizer = both(change, cls=onepass.Lion, **norm)
    assert optimizer.skipped_steps == expected.skipped_steps == 1
    for ours, theirs in zip(optimizer.telemetry, expected.telemetry, strict=True):
        torch.testing.assert_close(ours, theirs, **TELEMETRY)


def test_a_learning_rate_in_a_tensor():
    def change(optimizer, step):
        optimizer.param_groups[0]["lr"].fill_(0.1 / (step + 1))

    both(change, cls=onepass.Adagrad, lr=torch.tensor(0.1), lr_decay=0.1)
