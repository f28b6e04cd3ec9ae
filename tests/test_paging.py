"""Optimizers with paged states compute the same bits as unpaged ones, for every budget."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.paging.options import SMALLEST_PAGE, Paging

from .cases import (
    CASES,
    EVERY_FORMAT,
    STEP_FORMATS,
    adamw,
    assert_same,
    clone,
    last_variant,
    make_params,
    runs_here,
    same_bits,
    set_grads,
    some_formats,
    train,
)
from .paging_cases import SHAPES, budgets, paged_pages, total_bytes
from .support.thorough import THOROUGH

pytestmark = pytest.mark.usefixtures("links")

# --- equality with unpaged optimizers --------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "number", "states", "weights", "dtype"),
    [(c, n, *EVERY_FORMAT[i]) for n, c in enumerate(CASES) for i in some_formats(n)],
    ids=lambda value: getattr(value, "name", str(value).removeprefix("torch.")),
)
def test_every_rule_and_format_with_every_budget(case, number, states, weights, dtype):
    """`make test` runs each rule with two of the budgets."""
    params = make_params(SHAPES, dtype, 1)
    options = {**last_variant(case, states), "states": states, "weights": weights, "seed": 3}
    plain_params = clone(params)
    plain = case.ours(plain_params, **options)
    train(plain, plain_params, 3)

    def make(paging, params=params):
        return case.ours(params, **options, paged=paging)

    for paging in budgets(make) if THOROUGH else budgets(make)[number % 2 :: 2]:
        own = clone(params)
        optimizer = make(paging, own)
        train(optimizer, own, 3)
        assert_same(optimizer, plain)
        assert (paged_pages(optimizer) == 0) == (paging.budget > total_bytes(optimizer))


@pytest.mark.parametrize("backend", runs_here())
@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
def test_every_backend(backend, options):
    dtype = torch.bfloat16 if options.get("weights") else torch.float32
    params = make_params([(33,), (3000,), (0,), (4, 5)], dtype, 1)
    both = []
    for paged in (False, Paging(page_bytes=SMALLEST_PAGE)):
        own = clone(params)
        both.append(adamw(own, **options, backend=backend, paged=paged, max_grad_norm=1.0))
        train(both[-1], own, 2)
    assert_same(*both)
    assert paged_pages(both[1]) >= 1


@pytest.mark.parametrize("backend", runs_here())
def test_large_parameters_are_split_over_pages(backend):
    params = make_params([(5, 1700), (300,)], torch.float32, 1)
    params[0] = torch.nn.Parameter(params[0].detach().t().contiguous().t())  # strides (1, 5)
    both = []
    for paged in (False, Paging(page_bytes=SMALLEST_PAGE)):
        own = [torch.nn.Parameter(p.detach().clone()) for p in params]
        assert own[0].stride() == (1, 5)
        # The gradients are contiguous, unlike the parameter, so they are copied at each step.
        both.append(
            onepass.Adam(own, amsgrad=True, states="dynamic8", backend=backend, paged=paged)
        )
        train(both[-1], own, 2)
    assert_same(*both)
    assert paged_pages(both[1]) >= 2


@pytest.mark.parametrize("options", STEP_FORMATS, ids=str)
@pytest.mark.parametrize("budget", [0, 60_000])
def test_clipping_skipping_telemetry_and_schedules(options, budget):
    """Clipping, skipped steps, zeroed gradients, telemetry, parameter groups and a schedule."""
    dtype = torch.bfloat16 if options.get("weights") else torch.float32
    both = []
    for paged in (False, Paging(budget, SMALLEST_PAGE)):
        params = make_params(SHAPES, dtype, 1)
        groups = [
            {"params": params[:4]},
            {"params": params[4:], "lr": 0.01, "states": "dynamic8", "ema_decay": 0.5},
        ]
        extras = {"max_grad_norm": 0.5, "skip_nonfinite": True, "zero_grads": True}
        optimizer = adamw(groups, **options, **extras, telemetry=True, paged=paged)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        found = []
        for step in range(5):
            set_grads(params, dtype, step)
            if step == 2:
                params[2].grad[-1] = torch.inf
            optimizer.step()
            schedule.step()
            assert all(not p.grad.any() for p in params)
            found.append((optimizer.grad_norm, int(optimizer.skipped_steps), optimizer.telemetry))
        both.append((optimizer, found))
    (paged, plain) = both[1], both[0]
    assert_same(paged[0], plain[0])
    for ours, theirs in zip(paged[1], plain[1], strict=True):
        assert same_bits(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        for group, other in zip(ours[2], theirs[2], strict=True):
            for key, value in group.items():
                # Telemetry of a paged step is the float64 sum over its pages.
                torch.testing.assert_close(
                    value, other[key], rtol=1e-12, atol=0, equal_nan=True, msg=key
                )
    with paged[0].averaged_weights(), plain[0].averaged_weights():
        assert_same(paged[0], plain[0])


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, onepass.GradScaler])
def test_a_loss_scaler(scaler):
    both = []
    for paged in (False, Paging(page_bytes=SMALLEST_PAGE)):
        params = make_params(SHAPES, torch.float32, 1)
        fused = scaler is torch.amp.GradScaler
        optimizer = adamw(params, states="mx8", max_grad_norm=1.0, paged=paged, fused=fused)
        scale = scaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            set_grads(params, torch.float32, step)
            scale.scale(torch.ones(()))
            for p in params:
                p.grad *= scale.get_scale()
            if step == 1:
                params[0].grad[0] = torch.nan
            scale.step(optimizer)
            scale.update()
        both.append(optimizer)
    assert_same(*both)
    assert int(both[0].skipped_steps) == 1


def test_released_gradients(links):
    """The pages of the next parameter are fetched while the backward pass runs."""
    both = []
    for paged in (False, Paging(page_bytes=SMALLEST_PAGE)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5)))
        optimizer = adamw(net.parameters(), states="mx8", paged=paged)
        handle = onepass.release_gradients(net, optimizer)
        for step in range(4):
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            optimizer.step()
        handle.remove()
        net(x).square().mean().backward()
        optimizer.step()
        both.append(optimizer)
    assert_same(*both)


def test_gradient_release_shares_slabs_between_parameters(links):
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(50)))
    optimizer = adamw(net.parameters(), paged=Paging(page_bytes=SMALLEST_PAGE))
    onepass.release_gradients(net, optimizer)
    net(torch.ones(1, 4)).sum().backward()
    assert len(links[0].pinned) == 1


def test_gradient_release_prefetches_states():
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5)))
    optimizer = adamw(net.parameters(), paged=Paging(page_bytes=SMALLEST_PAGE))
    handle = onepass.release_gradients(net, optimizer)
    fetched = []
    for p in net.parameters():
        # This hook runs before the hook of release_gradients, which first accumulates the gradient.
        p.register_hook(
            lambda _, p=p: fetched.append(
                p in handle._plans and handle._plans[p]._parts[0]._pages[0].ready is not None
            )
        )
    for _ in range(2):
        fetched.clear()
        net(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    # Nothing prefetches the first parameter, and autograd may compute two gradients before it calls
    # their hooks.
    assert sum(fetched) >= len(fetched) - 2


def test_missing_gradients_and_parameters_added_later():
    both = []
    for paged in (False, Paging(40_000, SMALLEST_PAGE)):
        params = make_params(SHAPES, torch.float32, 1)
        optimizer = adamw(params[:6], states="mx8", paged=paged)
        for step in range(6):
            set_grads(params, torch.float32, step)
            params[step].grad = None
            if step == 3:
                optimizer.add_param_group({"params": params[6:], "states": "bf16"})
            if step == 4:
                optimizer.param_groups[0]["states"] = "fp32"
            optimizer.step()
        both.append(optimizer)
    assert_same(*both)
