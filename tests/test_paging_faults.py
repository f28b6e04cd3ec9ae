"""Errors with paged states: invalid options, lack of memory and failing copies."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import onepass
from onepass.paging import slabs
from onepass.paging.options import SMALLEST_PAGE, Paging, paging_of

from .cases import adamw, assert_same, clone, make_params, set_grads, snapshot, train
from .paging_cases import SHAPES, paged_pages
from .paging_links import Fault, RandomLink

pytestmark = pytest.mark.usefixtures("links")

SMALL = Paging(page_bytes=SMALLEST_PAGE)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paged", "budget"),
    [
        (True, 0),
        (0, 0),
        (1 << 30, 1 << 30),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("64000000", 64 * 10**6),
        ("0", 0),
        (Paging(budget=1 << 26), 1 << 26),
    ],
)
def test_budgets(paged, budget):
    assert paging_of(paged).budget == budget


def test_false_is_unpaged():
    assert paging_of(False) is None
    optimizer = adamw(make_params([(3,)], torch.float32, 1), paged=False)
    assert optimizer.pager is None
    with pytest.raises(ValueError, match="paged=True"):
        onepass.paging.footprints(optimizer)


@pytest.mark.parametrize(
    "paged",
    [-1, "-1", "", "GB", "2 gigabytes", "1e9", "2G2", 1.5, float("nan"), [1], b"1GB", "٣GB"],
    ids=repr,
)
def test_malformed_budgets(paged):
    with pytest.raises(ValueError, match="paged"):
        adamw(make_params([(3,)], torch.float32, 1), paged=paged)


@pytest.mark.parametrize("paged", [1, "1KB", (32 << 20) - 1])
def test_a_budget_below_one_page(paged):
    with pytest.raises(ValueError, match="below one page, 33554432 bytes"):
        adamw(make_params([(3,)], torch.float32, 1), paged=paged)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": -1},
        {"budget": 1.0},
        {"page_bytes": SMALLEST_PAGE - 1},
        {"buffers": 0},
        {"buffers": True},
    ],
    ids=str,
)
def test_malformed_paging(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Paging(**options)


@pytest.mark.parametrize(
    ("ours", "base", "states"),
    [
        (onepass.PagedAdam, onepass.Adam, "fp32"),
        (onepass.PagedAdamW, onepass.AdamW, "fp32"),
        (onepass.PagedAdamW8bit, onepass.AdamW8bit, "mx8"),
        (onepass.PagedLion, onepass.Lion, "fp32"),
        (onepass.PagedLion8bit, onepass.Lion8bit, "mx8"),
    ],
)
def test_paged_classes_default_to_paged(ours, base, states):
    """The Paged classes differ from their base classes only in the default paged=True."""
    params = make_params(SHAPES, torch.float32, 1)
    plain_params = clone(params)
    optimizer, plain = ours(params), base(plain_params)
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    assert optimizer.paging == Paging()
    assert optimizer.param_groups[0].get("states", "fp32") == states
    assert_same(optimizer, plain)
    assert paged_pages(optimizer) == 1
    assert ours(params, paged=False).pager is None
    assert ours(params, paged=1 << 30).paging.budget == 1 << 30


# --- memory ----------------------------------------------------------------------------------


def test_too_little_host_memory_is_an_error_before_any_change(monkeypatch):
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = adamw(params, paged=SMALL)
    needed = onepass.paging.footprints(optimizer)[torch.device("cpu")].host
    set_grads(params, torch.float32, 0)
    before = clone(params)
    for free in (0, needed - 1):
        monkeypatch.setattr(slabs, "free_memory", lambda free=free: free)
        with pytest.raises(MemoryError, match=r"GiB of host memory; .* are free .*paged="):
            optimizer.step()
        assert not optimizer.state
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    monkeypatch.setattr(slabs, "free_memory", lambda: needed)
    optimizer.step()
    monkeypatch.setattr(slabs, "free_memory", lambda: 0)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()  # the states exist already


def test_free_memory_of_this_machine_is_plausible():
    free = slabs.free_memory()
    assert free is None or 1 << 20 < free < 1 << 50


@pytest.mark.parametrize("what", ["slab", "ring"])
def test_failed_allocation_leaves_no_states(what, monkeypatch):
    params = make_params(SHAPES, torch.float32, 1)
    plain_params = clone(params)
    optimizer = adamw(params, paged=SMALL)
    set_grads(params, torch.float32, 0)

    def full(*_):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        if what == "slab":
            patch.setattr(slabs.np, "zeros", full)
        else:
            patch.setattr(RandomLink, "adopt", full)
        with pytest.raises(MemoryError, match="full"):
            optimizer.step()
    assert not optimizer.state
    plain = adamw(plain_params)
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    assert_same(optimizer, plain)


def test_memory_that_cannot_be_pinned(monkeypatch):
    """A failure to pin memory warns once for all slabs and optimizers and changes no result."""

    def refuse(*_):
        raise RuntimeError("cudaHostRegister: CUDA error 2")

    monkeypatch.setattr(RandomLink, "pin", refuse)
    monkeypatch.setattr(slabs, "_warned", False)
    monkeypatch.setattr(slabs, "SLAB", 1 << 14)
    plain_params = make_params(SHAPES, torch.float32, 1)
    plain = adamw(plain_params)
    train(plain, plain_params, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params = make_params(SHAPES, torch.float32, 1)
            optimizer = adamw(params, paged=SMALL)
            train(optimizer, params, 2)
            assert_same(optimizer, plain)
    (warning,) = caught
    assert "cannot be pinned (cudaHostRegister: CUDA error 2)" in str(warning.message)


def test_memory_is_unpinned_with_its_last_tensor(monkeypatch):
    unpinned = []
    monkeypatch.setattr(RandomLink, "pin", lambda *a: lambda: unpinned.append(a[2]))
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = adamw(params, paged=SMALL)
    train(optimizer, params, 1)
    kept = optimizer.state[params[0]]["exp_avg"]
    optimizer.state.clear()
    optimizer._plan = None
    gc.collect()
    assert unpinned == []
    del kept, optimizer
    gc.collect()
    assert len(unpinned) == 1


# --- failing copies --------------------------------------------------------------------------


def failing(links, fault, at_once):
    """An optimizer after one step whose link will fail at copy number `fault` of the next step."""
    params = make_params([(5000,), (33,), (7001,)], torch.float32, 1)
    optimizer = adamw(params, paged=SMALL)
    train(optimizer, params, 1)
    optimizer.pager.settle()
    (link,) = links
    links.clear()
    link.fault, link.at_once = link.copies + fault, at_once
    return params, optimizer, link


def copies_a_step(links):
    """The number of copies in one step of the optimizer of :func:`failing`, and the optimizer."""
    _, optimizer, link = failing(links, 10**6, False)
    return link.copies, optimizer


def refuses(params, optimizer):
    before = snapshot_of(params)
    for attempt in (
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.state[params[0]],
        lambda: dict(optimizer.state),
    ):
        with pytest.raises(RuntimeError, match=r"failed after it had changed.*load a checkpoint"):
            attempt()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot_of(params), strict=True))


def snapshot_of(params):
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_fault_in_any_copy_of_a_step(links, at_once):
    count, _ = copies_a_step(links)
    outcomes = set()
    for fault in range(count):
        plain_params = make_params([(5000,), (33,), (7001,)], torch.float32, 1)
        plain = adamw(plain_params)
        train(plain, plain_params, 1)
        params, optimizer, link = failing(links, fault, at_once)
        saved = [p.detach().clone() for p in params], optimizer.state_dict()
        # Clone the states, as saving to a file does.
        saved[1]["state"] = {
            i: {k: v.clone() for k, v in state.items()} for i, state in saved[1]["state"].items()
        }
        set_grads(params, torch.float32, 1)
        with pytest.raises(Fault, match=f"copy {link.fault}"):  # noqa: PT012
            optimizer.step()
            optimizer.state[params[0]]  # waits for the last copies
        outcomes.add(bool(optimizer.pager.failed))
        link.recover()
        if not optimizer.pager.failed:
            # Nothing was changed, so the same step can be repeated.
            assert all(torch.equal(p, q) for p, q in zip(params, saved[0], strict=True))
        else:
            refuses(params, optimizer)
            for p, q in zip(params, saved[0], strict=True):
                p.detach().copy_(q)
            optimizer.load_state_dict(saved[1])
        for step in (1, 2):
            train(optimizer, params, 1, step)
            train(plain, plain_params, 1, step)
        assert_same(optimizer, plain)
    # If the copies fail when they are requested, an early fault changes nothing. If they fail
    # later, the step has always changed something.
    assert outcomes == ({False, True} if at_once else {True})


def test_backend_error_in_a_page_refuses_further_steps(monkeypatch):
    params = make_params([(5000,), (7001,)], torch.float32, 1)
    optimizer = adamw(params, paged=SMALL, backend="reference")
    train(optimizer, params, 1)
    backend = onepass.backends.BACKENDS["reference"]
    calls = []

    def run(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return type(backend).run(backend, *args)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "run", run)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(optimizer, params, 1, 1)
    refuses(params, optimizer)


def test_failed_copy_in_gradient_release_refuses_further_steps(links, monkeypatch):
    net = torch.nn.Linear(64, 64)
    optimizer = adamw(net.parameters(), paged=SMALL)
    onepass.release_gradients(net, optimizer)
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    optimizer.pager.settle()
    links[0].fault = links[0].copies + 1
    with pytest.raises(Fault):  # noqa: PT012
        net(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="failed after it had changed"):
        net(torch.ones(1, 64)).sum().backward()


def test_error_before_the_sweep_changes_nothing():
    params = make_params(SHAPES, torch.float32, 1)
    plain_params = clone(params)
    optimizer, plain = adamw(params, paged=SMALL), adamw(plain_params)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    set_grads(params, torch.float32, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer), strict=True))
    optimizer.param_groups[0]["lr"] = 0.02
    train(optimizer, params, 1, 1)
    train(plain, plain_params, 2)
    assert_same(optimizer, plain)
