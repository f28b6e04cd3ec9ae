"""The work before a sweep, on every target: verdict, step counters and hyperparameters.

The verdict is the factor for the gradients and whether the step is skipped.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS, Policy
from onepass.engine.hyper_table import History, RowTable
from onepass.numerics.verdict import FACTOR, SKIP, SKIPPED, VERDICT_WIDTH
from onepass.rules import RULES

from .cases import CASES, advance, history, same_bits
from .support.targets import STAND_IN, every_target, needs_stand_in, one_in, other_targets
from .support.thorough import THOROUGH

REFERENCE = BACKENDS["reference"]
INF, NAN = math.inf, math.nan

# --- hyperparameters -------------------------------------------------------------------------

STEPS = [0, 1, 2, 999, (1 << 24) - 2, 1 << 24]
OWN = {
    "sgd": [{"momentum": m, "dampening": d} for m in (0.0, 0.9) for d in (0.0, 0.3)],
    "adagrad": [{"lr_decay": d, "eps": 1e-10} for d in (0.0, 0.01, 1 / 3)],
    "rmsprop": [{"alpha": a, "eps": 1e-8, "momentum": 0.9} for a in (0.0, 0.99, 1 / 3)],
    "adam": [
        {"betas": betas, "eps": eps}
        for betas in ((0.9, 0.999), (0.0, 0.95), (1 / 3, 0.99999), (0.5, 1 - 2**-53), (0.95, 0.0))
        for eps in (1e-8, 0.0, 1e-300)
    ],
    "muon": [{"momentum": m} for m in (0.0, 0.95, 1 / 3)],
    "lion": [{"betas": betas} for betas in ((0.9, 0.99), (0.0, 1 / 3))],
    "ademamix": [
        {"betas": betas, "alpha": 5.0, "t_alpha": warm_up, "t_beta3": warm_up}
        for betas in ((0.9, 0.999, 0.9999), (0.0, 0.95, 0.5), (1 / 3, 0.0, 0.0))
        for warm_up in (None, 1, 1000, 1 << 25)
    ],
    "schedulefree": [
        {"betas": betas, "warmup_steps": steps, "r": r, "weight_lr_power": power}
        for betas, steps in (((0.9, 0.999), 0), ((0.95, 0.0), 5), ((1 / 3, 0.9), 1 << 25))
        for r, power in ((0.0, 2.0), (1.5, 0.0), (0.3, 1.7))
    ],
}
"""The option values to test for each rule. Rules without an entry use those of adam that apply."""
DEFAULTS = {case.ours.rule.name: case.ours([torch.nn.Parameter(torch.ones(1))]) for case in CASES}
DEFAULTS["muon"] = onepass.Muon([torch.nn.Parameter(torch.ones(1, 1))])


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


def table_of(rule, device="cpu", most=None):
    """One row per combination of options, step count and history; at most `most` rows if given."""
    rows = [
        (group, history(RULES[rule], steps, fresh))
        for group, steps, fresh in itertools.product(groups_of(rule), STEPS, (False, True))
    ]
    if most:
        # The stride has no common factor with the number of rows, so the selection contains every
        # value of each option.
        stride = next(n for n in itertools.count(len(rows) // most) if math.gcd(n, len(rows)) == 1)
        rows = rows[::stride]
        assert {row.steps for _, row in rows} == set(STEPS)
    return RowTable(RULES[rule], rows, torch.device(device))


def assert_same_tables(a, b):
    for name in ("steps", "fresh", "hyper"):
        assert same_bits(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.counters.cpu(), b.counters)


# The interpreter has the first four in `make test`.
VERDICTS = [None, (1.0, 0.0), (1 / 3, 0.0), (0.7, 1.0), (1e-30, 0.0), (0.0, 0.0), (INF, 0.0)]
VERDICTS += [(NAN, 0.0)]


@pytest.mark.parametrize("rule", RULES)
@other_targets
def test_hyperparameters_match_the_reference(target, rule):
    """Each step starts from the tables of the step before; a skipped step changes nothing."""
    one_in(2, target, list(RULES).index(rule))
    most = 40 if target.interpreted else None
    ours, reference = table_of(rule, target.device, most), table_of(rule, "cpu", most)
    for judged in VERDICTS[: 4 if target.interpreted and not THOROUGH else None]:
        verdict = None
        if judged is not None:
            verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
            verdict[FACTOR], verdict[SKIP] = judged
        before = [t.clone() for t in (ours.steps, ours.fresh, ours.hyper)]
        advance(
            BACKENDS[target.backend], ours, None if verdict is None else verdict.to(target.device)
        )
        advance(REFERENCE, reference, verdict)
        skipped = judged is not None and judged[1]
        assert bool((ours.counters[:, 1] == 0).all()) == bool(skipped)
        if skipped:
            assert all(map(same_bits, before, (ours.steps, ours.fresh, ours.hyper)))
            # The reference writes the random seeds of a skipped step differently.
            assert torch.equal(ours.counters[:, 1].cpu(), reference.counters[:, 1])
        else:
            assert_same_tables(ours, reference)
    assert target.interpreted or len(ours.rows) > 128  # more rows than a thread block has threads
    assert not ours.fresh.any()


@every_target
def test_retreat_undoes_advance(target):
    """retreat undoes advance, whatever torch's default dtype is, and ignores skipped rows."""
    backend = BACKENDS[target.backend]
    table = table_of("sgd", target.device, 40 if target.interpreted else None)
    before = [t.clone() for t in (table.steps, table.fresh)]
    assert 0 < table.fresh.sum() < len(table.rows)
    skip = torch.tensor([1.0, 1.0, 0, 0, 0, 1], dtype=torch.float64, device=target.device)
    counted = before[0] < 1 << 24
    for verdict in (None, skip):
        advance(backend, table, verdict)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                backend.retreat(table, before[1])
        finally:
            torch.set_default_dtype(dtype)
        assert same_bits(table.steps[counted], before[0][counted])
        assert same_bits(table.fresh, before[1])
    # The optimizer states share the tensors of the rows.
    assert [float(row.step) for row in table.rows] == table.steps.tolist()


@every_target
def test_retreat_ignores_skipped_rows(target):
    backend = BACKENDS[target.backend]
    table = table_of("adam", target.device, 40 if target.interpreted else None)
    advance(backend, table, None)
    table.counters[::2, 1] = 0
    after = table.steps.clone()
    fresh = torch.rand(len(table.rows), device=target.device)
    backend.retreat(table, fresh)
    assert same_bits(table.steps[::2], after[::2])
    expected = torch.where(after == 1 << 24, after, after - 1)
    assert same_bits(table.steps[1::2], expected[1::2])
    assert same_bits(table.fresh, fresh)


@every_target
def test_retreat_at_the_largest_count_of_fp32(target):
    rows = [(next(groups_of("lion")), History(2.0**24, False))]
    table, backend = RowTable(RULES["lion"], rows, torch.device(target.device)), target.backend
    advance(BACKENDS[backend], table, None)
    assert float(table.steps) == 2.0**24
    BACKENDS[backend].retreat(table, table.kept[1:].clone())
    assert float(table.steps) == 2.0**24


@needs_stand_in
@pytest.mark.usefixtures("cuda_stand_in")
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
        advance(BACKENDS[STAND_IN], table, None)


# --- the verdict -----------------------------------------------------------------------------

FOUND = [
    None,
    [0.0, 0.0, 0.0],
    [9.0, 2.0, 0.0],
    [1e-20, 1e-10, 0.0],
    [3e300, 1e38, 0.0],
    [INF, INF, 2.0],
    [NAN, 3.0, 1.0],
]


@pytest.mark.parametrize("found", FOUND, ids=str)
@other_targets
def test_verdict_matches_the_reference(target, found):
    limits = (None,) if found is None else (None, 0.0, 1.0, 1 / 3, 1e30)
    policies = itertools.product(limits, (False, True), (False, True))
    policies = [Policy(*policy) for policy in policies]
    scales, infs = (None, 1.0, 65536.0, 1 / 3, 0.0, INF, NAN), (None, 0.0, 1.0, NAN)
    asked = list(itertools.product(policies, scales, infs))
    # 9 has no common factor with the numbers of values, so each pair of values occurs.
    asked = asked[::9] if target.interpreted else asked

    def number(value, device):
        return None if value is None else torch.tensor(value, device=device)

    verdicts = [torch.zeros(VERDICT_WIDTH, dtype=torch.float64) for _ in range(2)]
    verdicts[0] = verdicts[0].to(target.device)
    for policy, scale, inf in asked:
        for name, verdict in zip((target.backend, "reference"), verdicts, strict=True):
            measured = None if found is None else verdict.new_tensor(found)
            device = verdict.device
            BACKENDS[name].judge(
                verdict, measured, number(scale, device), number(inf, device), policy
            )
        assert same_bits(*verdicts), (policy, scale, inf, *verdicts)
    assert verdicts[0][SKIPPED] > 0


@needs_stand_in
@pytest.mark.usefixtures("cuda_stand_in")
def test_a_verdict_that_does_not_fit_is_refused():
    verdict = torch.zeros(VERDICT_WIDTH, dtype=torch.float64)
    for wrong in (
        (verdict[:5], None, None, None),
        (verdict, verdict[:2], None, None),
        (verdict, None, torch.ones((), dtype=torch.float16), None),
        (verdict, None, None, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="must be a contiguous"):
            BACKENDS[STAND_IN].judge(*wrong, Policy())
