"""Paged states on the host: state dicts, copies, and access to states between steps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import onepass
from onepass.paging.options import SMALLEST_PAGE, Paging

from .cases import STEP_FORMATS, adamw, assert_same, clone, make_params, same_bits, train
from .paging_cases import SHAPES, budgets, paged_pages
from .paging_links import RandomLink
from .support.thorough import THOROUGH

pytestmark = pytest.mark.usefixtures("links")

# --- state dicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
def test_resuming_with_another_budget(options):
    """`make test` runs each budget with another one for each format, and every pair together."""
    dtype = torch.bfloat16 if options.get("weights") else torch.float32
    params = make_params(SHAPES, dtype, 1)

    def make(paging):
        own = clone(params)
        return own, adamw(own, **options, paged=paging)

    whole, plain = make(False)
    train(plain, whole, 4)
    some = list(enumerate([False, *budgets(lambda paging: make(paging)[1])]))
    number = STEP_FORMATS.index(options)
    for (i, first), (j, second) in itertools.product(some, some):
        if not THOROUGH and (i + j + number) % len(some):
            continue
        own, optimizer = make(first)
        train(optimizer, own, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed_params = clone(own)
        resumed = adamw(resumed_params, **options, paged=second)
        resumed.load_state_dict(saved)
        train(resumed, resumed_params, 2, start=2)
        assert_same(resumed, plain)


def test_state_dict_shares_memory_with_the_slabs(links, tmp_path):
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = adamw(params, paged=Paging(page_bytes=SMALLEST_PAGE))
    train(optimizer, params, 2)
    before = links[0].copies
    saved = optimizer.state_dict()
    assert links[0].copies == before
    for i, param in enumerate(params):
        if param.numel():
            assert optimizer.pager.slabs.find(saved["state"][i]["exp_avg"]) is not None
            # Each state has a storage of its own size, so saving one state does not save the slab.
            assert saved["state"][i]["exp_avg"].untyped_storage().nbytes() == 4 * param.numel()
    torch.save(saved, tmp_path / "saved")
    torch_params = clone(params)
    theirs = torch.optim.AdamW(torch_params, lr=0.02, weight_decay=0.1)
    theirs.load_state_dict(torch.load(tmp_path / "saved"))
    assert same_bits(
        theirs.state[torch_params[2]]["exp_avg"], optimizer.state[params[2]]["exp_avg"]
    )


def test_loading_own_state_dict_with_pending_copies():
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = adamw(params, states="mx8", paged=Paging(page_bytes=SMALLEST_PAGE))
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    train(optimizer, params, 1, start=1)
    optimizer.load_state_dict(saved)  # saved shares memory with the states, which have taken step 2
    plain_params = make_params(SHAPES, torch.float32, 1)
    plain = adamw(plain_params, states="mx8")
    train(plain, plain_params, 2)
    for p, q in zip(params, plain_params, strict=True):
        assert same_bits(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])


def test_reading_a_state_waits_for_its_copy():
    params = make_params(SHAPES, torch.float32, 1)
    plain_params = clone(params)
    optimizer = adamw(params, weights="native", paged=Paging(page_bytes=SMALLEST_PAGE))
    plain = adamw(plain_params)
    for step in range(3):
        train(optimizer, params, 1, step)
        train(plain, plain_params, 1, step)
        kinds = [
            lambda o, p: o.state[p]["exp_avg"],
            lambda o, p: dict(o.state)[p]["exp_avg"],
            lambda o, p: {**o.state}[p]["exp_avg"],
            lambda o, p: o.state.get(p)["exp_avg"],
        ]
        read = kinds[step % len(kinds)]
        assert same_bits(read(optimizer, params[6]), read(plain, plain_params[6]))


def test_changed_states_are_used_by_the_next_step():
    both = []
    for paged in (False, Paging(page_bytes=SMALLEST_PAGE)):
        params = make_params(SHAPES, torch.float32, 1)
        optimizer = adamw(params, states="bf16", paged=paged)
        for step in range(5):
            train(optimizer, params, 1, step)
            if step == 0:
                optimizer.state[params[6]]["exp_avg"].mul_(2)
            if step == 1:
                optimizer.state[params[0]]["exp_avg"] = torch.ones(33, dtype=torch.bfloat16)
            if step == 2:
                optimizer.state[params[6]]["exp_avg"].data = torch.ones(7001, dtype=torch.bfloat16)
            if step == 3:
                params[6].data = params[6].detach() + 1
        both.append(optimizer)
    assert_same(*both)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_optimizers_are_paged(how, tmp_path):
    params = make_params(SHAPES, torch.float32, 1)
    optimizer = adamw(params, paged=Paging(page_bytes=SMALLEST_PAGE))
    train(optimizer, params, 2)
    if how == "pickle":
        torch.save(optimizer, tmp_path / "optimizer")
        twin = torch.load(tmp_path / "optimizer", weights_only=False)
    else:
        twin = copy.deepcopy(optimizer)
    twin_params = [p for g in twin.param_groups for p in g["params"]]
    train(optimizer, params, 2, 2)
    train(twin, twin_params, 2, 2)
    assert_same(twin, optimizer)
    assert paged_pages(twin) == paged_pages(optimizer) > 0


def test_conversions_of_paged_state_dicts():
    params = make_params(SHAPES, torch.bfloat16, 1)
    plain_params = clone(params)
    options = {"states": "mx8", "weights": "split8"}
    paged = adamw(params, **options, paged=Paging(page_bytes=SMALLEST_PAGE))
    plain = adamw(plain_params, **options)
    train(paged, params, 2)
    train(plain, plain_params, 2)
    ours, theirs = (
        onepass.convert_state_dict(o, o.state_dict(), states="fp32", weights="native")
        for o in (paged, plain)
    )
    for i, state in theirs["state"].items():
        for key, value in state.items():
            assert same_bits(ours["state"][i][key], value)
    for a, b in ((paged, params), (plain, plain_params)):
        train(a, b, 1, 2)
    full = []
    for optimizer, own in ((paged, params), (plain, plain_params)):
        net = torch.nn.Module()
        net.weights = torch.nn.ParameterList(own)
        full.append(onepass.full_precision_state_dict(net, optimizer))
    assert all(same_bits(full[0][key], full[1][key]) for key in full[0])


# --- memory use ------------------------------------------------------------------------------


def on_device(optimizer, link: RandomLink) -> tuple[int, int]:
    """Bytes of states outside the slabs and bytes of the ring buffers, measured."""
    states = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and t.dim() and optimizer.pager.slabs.find(t) is None
    }
    return sum(states.values()), sum(len(buffer) for buffer in link.adopted)


@pytest.mark.parametrize("states", ["fp32", "mx8"])
def test_memory_matches_the_prediction(states, links):
    params = make_params([(50_000,)] * 20 + [(64,)] * 50, torch.float32, 1)
    for budget in (0, 1 << 17, 1 << 20, 1 << 24):
        links.clear()
        optimizer = onepass.AdamW(
            clone(params), states=states, paged=Paging(budget, page_bytes=1 << 16)
        )
        (predicted,) = onepass.paging.footprints(optimizer).values()
        own = optimizer.param_groups[0]["params"]
        train(optimizer, own, 2)
        resident, ring = on_device(optimizer, links[0] if links else RandomLink(0))
        assert ring == predicted.ring <= 4 << 16
        assert predicted.resident <= budget
        assert resident == pytest.approx(predicted.resident, rel=0.005, abs=0)
        # The predicted host memory equals the pinned memory: users learn of a lack of host memory
        # in advance, and no more than that is pinned.
        assert sum(links[0].pinned if links else []) == pytest.approx(predicted.host, abs=4096)


def test_small_states_share_one_copy(links):
    params = make_params([(64,)] * 20, torch.float32, 1)
    optimizer = onepass.AdamW(params, states="mx8", paged=True)
    train(optimizer, params, 1)
    assert paged_pages(optimizer) == 1
    assert links[0].copies == 2  # one to the device, one back
