"""The record of changed weights that a step writes, on every target."""

from __future__ import annotations

import copy
import math
import pickle
import random

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS, Entry, StepArgs
from onepass.engine.changed_weights import _take_by_torch, take_changes
from onepass.formats import NATIVE, STATE_FORMATS
from onepass.paging.options import Paging
from onepass.rules import HYPER_WIDTH, RULES

from .cases import (
    CASES,
    EVERY_FORMAT,
    STEP_LIST,
    adamw,
    assert_same,
    last_variant,
    make_params,
    served,
    set_grads,
    some_formats,
)
from .paging_cases import SMALLEST_PAGE
from .support.targets import every_target, one_in

SIZES = [(0,), (), (31,), (7, 37), (1025,)]


def codes(tensor):
    """The stored bits of a tensor in memory order, as integers."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).cpu()
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32).clone()


def recorded(optimizer, param):
    """Which weights of a parameter the record says have changed, in memory order."""
    words = optimizer.changes._tracked[param].bits.cpu()
    bits = (words[:, None] >> torch.arange(32)) & 1
    return bits.flatten()[: param.numel()].bool()


class Compared:
    """Compares the record of an optimizer with the bits of its parameters."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.changed = [torch.zeros(p.numel(), dtype=torch.bool) for p in self.params]

    def step(self, dtype=torch.float32, seed=0):
        before = [codes(p) for p in self.params]
        self.optimizer.step()
        for p, old, changed in zip(self.params, before, self.changed, strict=True):
            changed |= codes(p) != old
            assert torch.equal(recorded(self.optimizer, p), changed), (p.dtype, p.shape)


def every_group(case, number, device="cpu"):
    """A group of small parameters for each format that a row of the table runs with."""
    groups = []
    for i in some_formats(number):
        states, weights, dtype = EVERY_FORMAT[i]
        variant = last_variant(case, states)
        if served(variant, states):
            params = make_params(SIZES, dtype, seed=i, device=device)
            groups.append({"params": params, "states": states, "weights": weights, **variant})
    return groups


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@every_target
def test_the_record_is_the_bitwise_difference(target, case):
    number = CASES.index(case)
    one_in(4, target, number)
    groups = every_group(case, number, target.device)[:: 4 if target.interpreted else 1]
    compared = Compared(case.ours(groups, lr=1e-4, backend=target.backend, track_changes=True))
    for step in range(2):  # the second step adds to the bits of the first
        set_grads(compared.params, torch.float32, seed=step)
        for p in compared.params:
            if p.numel() > 3:
                p.grad.view(-1)[1 + step] = (math.nan, math.inf)[step]
        compared.step()
    assert any(changed.any() for changed in compared.changed)
    assert not all(changed.all() for changed in compared.changed)


@every_target
def test_skipped_steps_change_nothing_and_options_keep_the_record(target):
    params = make_params([*STEP_LIST, (3000,)], torch.bfloat16, 1, device=target.device)
    options = {"skip_nonfinite": True, "max_grad_norm": 1.0, "zero_grads": True}
    options |= {"ema_decay": 0.9, "telemetry": True, "states": "mx8", "weights": "split8"}
    compared = Compared(adamw(params, backend=target.backend, track_changes=True, **options))
    for step in range(3):
        set_grads(params, torch.bfloat16, seed=step)
        if step == 1:
            params[2].grad.fill_(math.nan)
        compared.step()
    assert int(compared.optimizer.skipped_steps) == 1


def test_weights_are_the_same_without_a_record():
    results = []
    for tracked in (False, True):
        params = make_params([(70000,), (33,)], torch.bfloat16, seed=1)
        optimizer = adamw(params, states="mx8", weights="stochastic", track_changes=tracked)
        for step in range(2):
            set_grads(params, torch.bfloat16, seed=step)
            optimizer.step()
        results.append(optimizer)
        assert (optimizer.changes is not None) == tracked
    assert_same(*results)


def test_memory_orders_and_long_parameters():
    params = make_params([(70, 900), (20, 30)], torch.bfloat16, seed=1)
    params[1].data = params[1].data.t().contiguous().t()
    compared = Compared(adamw(params, track_changes=True))
    for step in range(2):
        set_grads(params, torch.bfloat16, seed=step)
        compared.step()


@pytest.mark.parametrize("weights", ["native", "split8"])
def test_pages(weights):
    params = make_params([(40, 1000), (33,), (7, 9)], torch.bfloat16, seed=1)
    paged = Paging(page_bytes=SMALLEST_PAGE)
    optimizer = adamw(params, states="mx8", weights=weights, paged=paged, track_changes=True)
    compared = Compared(optimizer)
    for step in range(2):
        set_grads(params, torch.bfloat16, seed=step)
        compared.step()
    (part,) = optimizer._plan._parts
    assert len(part._pages) > 2  # the first parameter is cut


def test_muon_and_released_gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 8)).bfloat16()
    groups = onepass.muon_groups(model)
    compared = Compared(onepass.Muon(groups, lr=1e-3, track_changes=True))
    set_grads(compared.params, torch.bfloat16, seed=0)
    compared.step()
    optimizer = adamw(model.parameters(), track_changes=True)
    onepass.release_gradients(model, optimizer)
    for _ in range(2):
        before = [codes(p) for p in model.parameters()]
        model(torch.randn(4, 32, dtype=torch.bfloat16)).square().mean().backward()
        for p, old in zip(model.parameters(), before, strict=True):
            found = recorded(optimizer, p)
            assert torch.equal(found, codes(p) != old)
            optimizer.changes._tracked[p].bits.zero_()


@pytest.mark.parametrize("first", [5, (1 << 32) - 100, (1 << 32) - 96])
@every_target
def test_shards_that_begin_anywhere(target, first):
    if target.interpreted and first == 5:
        pytest.skip("the other rows cover it")
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(700, generator=generator).to(target.device, torch.bfloat16)
    grad = torch.randn(700, generator=generator).to(target.device, torch.bfloat16)
    bits = torch.zeros(22, dtype=torch.int32, device=target.device)
    form, code = STATE_FORMATS["fp32"], NATIVE[torch.bfloat16]
    entry = Entry(param, {}, form, code, RULES["sgd"], 0, 0, 11, first=first, changed=bits)
    backend = BACKENDS[target.backend]
    if target.backend == "triton" and first % 32:
        with pytest.raises(ValueError, match="multiple of 32; parameter 11 begins at element"):
            backend.prepare([entry])
        return
    prepared = backend.prepare([entry])
    hyper = torch.zeros(1, HYPER_WIDTH)
    hyper[0, :2] = torch.tensor([1.0, 1e-3])
    before = codes(param)
    assert backend.refresh(prepared, [param], [grad])
    backend.run(
        prepared, StepArgs(hyper.to(target.device), torch.tensor([[0, 1]]).to(target.device))
    )
    found = ((bits.cpu()[:, None] >> torch.arange(32)) & 1).flatten().bool()
    assert torch.equal(found[:700], codes(param) != before)
    assert not found[700:].any()
    assert found.any()


# --- taking the changes out of the record ---


def lists(seed):
    """Records and parameters with changes in none, some and all of the weights."""
    rng = random.Random(seed)
    sizes = [0, 1, 31, 32, 33, 5000, 300_000, *([3] * 40)]
    dtype = rng.choice([torch.float32, torch.bfloat16])
    params = [torch.randn(n).to(dtype) for n in sizes]
    records = []
    for param in params:
        bits = torch.rand(param.numel()) < rng.choice([0.0, 0.01, 1.0])
        words = torch.zeros(-(-param.numel() // 32) * 32, dtype=torch.int64)
        words[: len(bits)] = bits
        word = (words.view(-1, 32) << torch.arange(32)).sum(1)
        records.append(word.to(torch.int32))
    return records, params


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("how", ["library", "triton"])
def test_changes_are_taken_in_order_and_cleared(how, wide):
    records, params = lists(seed=3)
    copies = [record.clone() for record in records]
    expected = _take_by_torch(copies, params, wide)
    if how == "triton":
        pytest.importorskip("triton")
        if BACKENDS["triton"].unavailable(torch.device("cpu")):
            pytest.skip("Triton's interpreter is off")
        from onepass.triton_kernels.changes import launch

        some = [0, 1, 4, 5]
        records, params = [records[i] for i in some], [params[i] for i in some]
        copies = [record.clone() for record in records]
        found, expected = launch(records, params, wide), _take_by_torch(copies, params, wide)
    else:
        if onepass.ops.missing:
            pytest.skip(onepass.ops.missing)
        found = take_changes(records, params, wide)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert not any(record.any() for record in records)


def test_take_changes_refuses_what_does_not_fit():
    if onepass.ops.missing:
        pytest.skip(onepass.ops.missing)
    take = torch.ops.onepass.take_changes
    record, param = torch.zeros(2, dtype=torch.int32), torch.zeros(40)
    for records, params in (
        ([record], [param, param]),
        ([record[:1]], [param]),
        ([record.long()], [param]),
        ([torch.zeros(4, dtype=torch.int32)[::2]], [param]),
        ([record, record], [param, param.bfloat16()]),
        ([record], [param.double()]),
        ([record], [torch.zeros(1).expand(40)]),
        ([record], [torch.zeros(80)[::2]]),
        ([record, record], [param, param]),
        ([torch.tensor([0, 1 << 8], dtype=torch.int32)], [param]),
    ):
        with pytest.raises(RuntimeError, match="onepass: "):
            take(records, params, False)
    torch.library.opcheck(
        take.default,
        ([record], [param], False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_copies_and_pickles_begin_whole():
    params = make_params([(40,)], torch.bfloat16, seed=1)
    optimizer = adamw(params, track_changes=True)
    set_grads(params, torch.bfloat16, seed=0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.changes is not optimizer.changes
        model = torch.nn.ParameterList(other.param_groups[0]["params"])
        assert onepass.take_delta(model, other).complete
    assert "track_changes: True" in repr(optimizer)
    assert onepass.Lion(params, track_changes=False).changes is None
    with pytest.raises(ValueError, match="track_changes must be True or False"):
        adamw(params, track_changes=1.5)
