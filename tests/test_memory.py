"""onepass.memory: predictions compared with real steps, for every rule and format."""

from __future__ import annotations

import json

import pytest
import torch

import onepass
from onepass import memory
from onepass.memory.measure import measure
from onepass.memory.predict import predict
from onepass.memory.probes import resident_growth
from onepass.memory.report import TOLERANCE, Bytes, MemoryReport
from onepass.memory.simulate import simulate, with_gradients
from onepass.paging.options import Paging

from .cases import CASES, EVERY_FORMAT, last_variant, some_formats

BIG = 1 << 16
SHAPES = [(BIG + 3,), (256, 300), (), (0,), (33,), (1023,), (7, 5, 3)]
"""Large tensors, and small ones that are no multiple of a block.

The state allocator places the states of the small tensors side by side.
"""


def meta(dtype, shapes=SHAPES):
    return [torch.nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in shapes]


def assert_close(report):
    for part in ("weights", "gradients", "states", "peak", "ring", "host"):
        found = report.difference(part)
        assert abs(found) <= TOLERANCE, f"{part}: {report}"


@pytest.mark.parametrize(
    ("case", "states", "weights", "dtype"),
    [(c, *EVERY_FORMAT[i]) for n, c in enumerate(CASES) for i in some_formats(n)],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_rule_and_format_takes_what_is_predicted(case, states, weights, dtype):
    options = {**last_variant(case, states), "states": states, "weights": weights}

    def make(params):
        return case.ours(params, **options, ema_decay=0.9)

    params = meta(dtype)
    report = MemoryReport(case.name, 1, predicted=predict(make(params)))
    report.measured, _ = measure(make, params)
    assert_close(report)
    # Predicted states are exact to the byte; a step also allocates small tables.
    assert report.predicted.held == report.measured.held
    assert report.predicted.temporary == 0
    assert report.measured.temporary < 2000


@pytest.mark.parametrize("states", onepass.formats.STATE_FORMATS)
@pytest.mark.parametrize("budget", [True, 1 << 20])
def test_paged_states(states, budget):
    paging = Paging(0 if budget is True else budget, page_bytes=1 << 16)

    def make(params):
        return onepass.AdamW(params, states=states, weights="kahan", paged=paging)

    shapes = [(BIG * 2,), (BIG * 3,), (BIG,), (BIG, 4)]
    params = meta(torch.bfloat16, shapes)
    report = MemoryReport("paged", 1, predicted=predict(make(params)))
    report.measured, _ = measure(make, params)
    assert report.predicted.ring > 0
    assert report.predicted.host > 0
    assert_close(report)


def test_gradients_of_another_dtype_and_frozen_parameters():
    params = meta(torch.bfloat16)
    params[0].requires_grad_(False)

    report = memory.profile(onepass.Lion, params, grad_dtype=torch.float32, measure=True)
    assert report.ours
    total, trained = (sum(p.numel() for p in ps) for ps in (params, params[1:]))
    assert report.predicted.weights == 2 * total
    assert report.predicted.gradients == 4 * trained
    assert_close(report)
    assert report.predicted.held == report.measured.held


# Tensors so large that the step counters, 4 bytes each, are negligible.
PEERS = {
    "adamw-foreach": (lambda p: torch.optim.AdamW(p, foreach=True), 1.0),
    "adamw-loop": (lambda p: torch.optim.AdamW(p, foreach=False), None),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, fused=True), 0.0),
    "sgd-foreach": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True), None),
    "rmsprop-foreach": (lambda p: torch.optim.RMSprop(p, foreach=True), None),
    "adagrad-foreach": (lambda p: torch.optim.Adagrad(p, foreach=True), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PEERS)
def test_simulated_steps_of_torch_take_what_real_ones_do(name, dtype):
    make, lists = PEERS[name]
    params = meta(dtype, [(BIG, 4), (BIG,), (BIG, 3), (33,)])
    report = MemoryReport(name, 1, predicted=simulate(make, params))
    report.measured, _ = measure(make, params)
    assert_close(report)
    if lists is not None:
        whole = lists * report.measured.weights
        assert report.measured.temporary == pytest.approx(whole, rel=1e-4, abs=100)


def test_torch_foreach_has_a_copy_of_the_list_and_ours_has_none():
    """Measures the peak of the process, which includes memory outside of torch's allocators."""
    found = {}
    for name, make in (
        ("torch", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("onepass", lambda p: onepass.AdamW(p)),
    ):
        params = with_gradients(meta(torch.float32, [(1 << 20, 4)] * 4), "cpu", None)
        optimizer = make(params)
        optimizer.step()
        found[name] = resident_growth(optimizer.step)
    if found["torch"] is None:
        pytest.skip("this kernel does not tell the peak of a process")
    whole = 4 * (4 << 20) * 4
    assert found["torch"] == pytest.approx(whole, rel=0.05)
    assert found["onepass"] < 0.02 * whole


def test_making_an_average_takes_no_temporary_tensor():
    """Also while the states are being made: the last parameter may be the largest."""

    def make(params):
        return onepass.AdamW(params, states="mx8", ema_decay=0.9)

    found, _ = measure(make, meta(torch.bfloat16, [(33,), (BIG, 8)]))
    assert found.temporary < 2000


def test_profile_leaves_an_optimizer_alone():
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 50)
    for optimizer in (
        onepass.AdamW(model.parameters(), states="mx8", max_grad_norm=1.0),
        torch.optim.AdamW(model.parameters()),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        report = memory.profile(optimizer, measure=True)
        assert report.predicted.held == report.measured.held
        assert not optimizer.state
        assert all(p.grad is None for p in model.parameters())
        assert all(map(torch.equal, before, model.parameters()))
    json.dumps(report.as_dict())
    assert "peak of the step" in str(report)


def test_profile_says_what_is_wrong():
    with pytest.raises(ValueError, match="params must be given"):
        memory.profile(lambda p: onepass.AdamW(p))
    with pytest.raises(ValueError, match="at least one parameter"):
        memory.profile(lambda p: onepass.AdamW(p), [])
    with pytest.raises(ValueError, match="every parameter of the optimizer"):
        memory.profile(onepass.AdamW(meta(torch.float32)), meta(torch.float32))


def test_an_optimizer_that_cannot_be_simulated_is_still_measured():
    class Peeking(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"] = torch.zeros_like(p) if p.sum().item() else torch.ones_like(p)

    report = memory.profile(Peeking, meta(torch.float32), measure=True)
    assert report.predicted is None
    assert "not predicted" in report.problem
    assert report.measured.moments == report.measured.weights
    assert report.difference() is None


def test_bytes_add_up():
    one = Bytes(weights=1, gradients=2, moments=3, companions=4, ema=5, ring=6, temporary=7, host=8)
    assert one.held == 21
    assert one.peak == 28
    assert one.states == 20
    assert (one + one).peak == 56


@pytest.mark.gpu
@pytest.mark.parametrize(("states", "weights", "dtype"), EVERY_FORMAT)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_predictions_match_measurements_on_a_gpu(case, states, weights, dtype):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here: the caching allocator cannot be asked")
    options = {**last_variant(case, states), "states": states, "weights": weights}
    shapes = [(1 << 20, 4), (33,), (1023,), (1 << 16, 17)]
    report = memory.profile(
        lambda p: case.ours(p, **options), meta(dtype, shapes), device="cuda", measure=True
    )
    assert_close(report)
    found = torch.cuda.memory_allocated()
    del report
    assert found < 1 << 20, "measuring kept tensors"
