"""Muon: its sweeps on every target, its groups, its shapes and the features of the step."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS
from onepass.memory.predict import predict
from onepass.muon.batches import Settings
from onepass.muon.products import TorchProducts

from .cases import clone, same_bits, set_grads
from .muon_cases import REST, both_groups, error, matrices, newton_schulz
from .support.targets import other_targets

# --- beside torch.optim.Muon -----------------------------------------------------------------


def exact_muon(params, steps, **options):
    """torch.optim.Muon's formula, with products in float64."""
    buffers = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        set_grads(params, torch.float32, seed=step)
        for p, buffer in zip(params, buffers, strict=True):
            buffer.lerp_(p.grad, 0.05)
            u = p.grad.lerp(buffer, 0.95) if options["nesterov"] else buffer
            x = newton_schulz(u)
            rows, cols = p.shape
            ratio = math.sqrt(max(1, rows / cols))
            if options.get("adjust_lr_fn") == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(rows, cols))
            p.data.mul_(1 - 0.02 * 0.1).add_(x.float(), alpha=-0.02 * ratio)


@pytest.mark.parametrize(
    "options", [{"nesterov": True}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}]
)
def test_weights_stay_within_the_rounding_of_torchs_products(options):
    """torch.optim.Muon differs from exact products by its bf16 rounding; onepass by less."""
    shapes = [(16, 16), (24, 8), (8, 24)]
    exact, theirs = matrices(shapes=shapes), matrices(shapes=shapes)
    exact_muon(exact, 20, **options)
    optimizer = torch.optim.Muon(theirs, lr=0.02, **options)
    results = {}
    for precision in ("fp32", "bf16"):
        ours = results[precision] = matrices(shapes=shapes)
        muon = onepass.Muon(ours, 0.02, precision=precision, **options)
        for step in range(20):
            set_grads(ours, torch.float32, seed=step)
            muon.step()
    for step in range(20):
        set_grads(theirs, torch.float32, seed=step)
        optimizer.step()
    for i, expected in enumerate(exact):
        torchs = error(theirs[i].data, expected.data)
        assert error(results["fp32"][i].data, expected.data) < 0.01 * torchs
        assert error(results["bf16"][i].data, expected.data) < 2 * torchs


def test_arguments_and_state_dicts_are_torchs():
    ours, theirs = matrices(shapes=[(8, 8), (4, 6)]), matrices(shapes=[(8, 8), (4, 6)])
    values = (0.01, 0.2, 0.9, False, (3.0, -4.0, 2.0), 1e-6, 4, "match_rms_adamw")
    muon, other = onepass.Muon(ours, *values), torch.optim.Muon(theirs, *values)
    for step in range(2):
        set_grads(ours, torch.float32, step)
        set_grads(theirs, torch.float32, step)
        muon.step()
        other.step()
    saved, expected = muon.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for i, entry in expected["state"].items():
        assert saved["state"][i].keys() == entry.keys()
        torch.testing.assert_close(saved["state"][i], entry)
    other.load_state_dict(saved)
    fresh = onepass.Muon(ours)
    fresh.load_state_dict(expected)
    assert same_bits(fresh.state[ours[0]]["momentum_buffer"], theirs_buffer(expected))
    set_grads(ours, torch.float32, 3)
    fresh.step()
    default = onepass.Muon(ours).param_groups[0]
    assert default.items() == torch.optim.Muon(ours).param_groups[0].items()


def theirs_buffer(state_dict):
    return state_dict["state"][0]["momentum_buffer"]


# --- the sweeps ------------------------------------------------------------------------------

FORMATS = [
    {},
    {"states": "bf16", "weights": "split8", "ema_decay": 0.9},
    {"states": "bf16", "weights": "stochastic", "nesterov": False, "maximize": True},
    {"weights": "kahan", "zero_grads": True, "cautious_weight_decay": True},
]


def stepped(backend, options, steps=2):
    """Weights and states after steps of both kinds of groups, with a clipped norm."""
    dtype = torch.bfloat16 if "weights" in options else torch.float32
    params, rest = matrices(0, dtype), matrices(1, dtype, REST)
    groups = both_groups(params, rest, states="mx8" if "weights" in options else "fp32")
    optimizer = onepass.Muon(groups, 0.02, **options, max_grad_norm=50.0, backend=backend)
    for step in range(steps):
        set_grads(params + rest, dtype, seed=step)
        optimizer.step()
    found = [*params, *rest]
    for p in (*params, *rest):
        found += [v for k, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor)]
    if options.get("zero_grads"):
        assert not any(p.grad.any() for p in (*params, *rest))
    return found


@pytest.mark.parametrize("options", FORMATS, ids=str)
@other_targets
def test_the_sweeps_match_the_reference(target, options):
    """Products of CPU tensors are the same for all targets, so all bits must be equal."""
    if target.device != "cpu":
        pytest.skip("products on a GPU have other bits")
    expected = stepped("reference", options)
    found = stepped(target.backend, options)
    assert len(found) == len(expected)
    assert all(map(same_bits, found, expected))


def test_other_groups_are_adamws():
    """A group with use_muon=False has AdamW's bits and AdamW's defaults."""
    params, rest = matrices(), matrices(1, shapes=REST)
    alone = clone(rest)
    muon = onepass.Muon(both_groups(params, rest), 0.5, 0.3, states="bf16", seed=3)
    adamw = onepass.AdamW(alone, seed=3)
    group = muon.param_groups[1]
    for name, value in adamw.param_groups[0].items():
        if name != "params" and name not in ("foreach", "fused", "capturable", "differentiable"):
            assert group.get(name, False) == value, name
    assert "momentum" not in group
    for step in range(3):
        set_grads(rest, torch.float32, step)
        set_grads(alone, torch.float32, step)
        set_grads(params, torch.float32, step)
        muon.step()
        adamw.step()
    assert all(map(same_bits, rest, alone))
    assert {*muon.state[rest[0]]} == {"exp_avg", "exp_avg_sq", "step"}
    assert {*muon.state[params[0]]} == {"momentum_buffer", "step"}


def test_lr_and_decay_are_read_at_every_step():
    """A changed option has the effect of an optimizer that was made with it."""
    changes = {"lr": torch.tensor(0.3), "weight_decay": 0.5, "momentum": 0.5, "ns_steps": 3}
    changes |= {"cautious_weight_decay": True}
    changes |= {"eps": 1e-3, "ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw"}
    params = matrices()
    one = onepass.Muon(params)
    set_grads(params, torch.float32, 0)
    one.step()
    other = clone(params)
    two = onepass.Muon(other, **changes)
    two.load_state_dict({**one.state_dict(), "param_groups": two.state_dict()["param_groups"]})
    one.param_groups[0].update(changes)
    for owned, optimizer in ((params, one), (other, two)):
        set_grads(owned, torch.float32, 1)
        optimizer.step()
    assert all(map(same_bits, params, other))


def test_cautious_decay_compares_the_weight_with_the_orthogonalised_update():
    """AdamW's groups do not take the value of the optimizer."""
    results = {}
    for name, decay, cautious in (("plain", 0, False), ("always", 5, False), ("cautious", 5, True)):
        params, rest = matrices(), matrices(1, shapes=REST)
        muon = onepass.Muon(both_groups(params, rest), 0.1, decay, cautious_weight_decay=cautious)
        assert "cautious_weight_decay" not in muon.param_groups[1]
        set_grads(params + rest, torch.float32, 0)
        muon.step()
        results[name] = params, rest
    assert all(map(same_bits, results["always"][1], results["cautious"][1]))
    changed = (params for params, _ in results.values())
    for before, plain, always, found in zip(matrices(), *changed, strict=True):
        kept = (before - plain) * before >= 0
        seen = before != plain  # the sign of an update that rounding removes is not known
        assert torch.equal(found[seen], torch.where(kept, always, plain)[seen])


# --- shapes ----------------------------------------------------------------------------------


def directions_of(param, group):
    """The change of one parameter, in float64, with lr 1 and no decay."""
    before = param.detach().clone()
    optimizer = onepass.Muon([{"params": [param], **group}], 1.0, 0.0)
    optimizer.step()
    return before.double() - param.detach().double()


def by_hand(blocks):
    """Each matrix by itself: the first direction is (1 - mu^2) times the gradient."""
    return [newton_schulz(0.0975 * g) * math.sqrt(max(1, g.shape[0] / g.shape[1])) for g in blocks]


@pytest.mark.parametrize(
    ("shape", "group", "take"),
    [
        ((3, 6, 4), {}, lambda g: list(g)),
        ((2, 3, 4, 6), {"flatten": False}, lambda g: list(g.flatten(0, 1))),
        ((6, 4, 3, 3), {}, lambda g: [g.flatten(1)]),
        ((6, 4, 3), {"flatten": True}, lambda g: [g.flatten(1)]),
        ((12, 5), {"split": (3, 0)}, lambda g: list(g.chunk(3))),
        ((5, 12), {"split": (3, 1)}, lambda g: list(g.chunk(3, 1))),
        ((2, 12, 5), {"split": (3, -2)}, lambda g: [b for h in g for b in h.chunk(3)]),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "permuted"])
def test_shapes_are_read_as_matrices(shape, group, take, layout):
    """In any memory order, each matrix is orthogonalised by itself."""
    order = list(range(len(shape)))
    if layout == "reversed":
        order.reverse()
    elif layout == "permuted":
        order = [*order[1:], order[0]]
    memory = torch.zeros([shape[d] for d in order])
    back = [order.index(d) for d in range(len(shape))]
    param = torch.nn.Parameter(memory.permute(back))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    param.grad = torch.empty_like(param).copy_(grad)
    found = take(directions_of(param, group))
    for one, expected in zip(found, by_hand(take(grad)), strict=True):
        assert error(one.reshape(expected.shape), expected) < 1e-4


def test_small_scratch_has_the_same_result():
    """Batches of one matrix give the result of large batches, up to the order of a product."""
    results = []
    for scratch in (0, "1MB"):
        params = matrices()
        optimizer = onepass.Muon(params, 0.1, muon_scratch=scratch)
        set_grads(params, torch.float32, 0)
        optimizer.step()
        results.append(params)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_products_are_fp32_where_bf16_products_are_slow(capability, dtype, monkeypatch):
    """Then a step rounds to bf16 twice: each direction, before and after the products."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for shape, group, take in (
        ((24, 8), {}, lambda g: [g]),
        ((3, 8, 24), {}, list),
        ((8, 32), {"split": (2, 1)}, lambda g: list(g.chunk(2, 1))),
    ):
        (param,) = matrices(shapes=[shape])
        set_grads([param], torch.float32, 0)
        muon = onepass.Muon([{"params": [param], **group}], 1.0, 0.0, precision="bf16")
        before = param.detach().double()
        muon.step()
        assert [t.dtype for t in muon.scratch()] == [torch.bfloat16, dtype]
        if dtype == torch.float32:
            found = take(before - param.detach().double())
            for one, u in zip(found, take(param.grad * 0.0975), strict=True):
                expected = newton_schulz(u.bfloat16()) * math.sqrt(max(1, shape[-2] / shape[-1]))
                # Half an ulp of bf16 for the result, and for directions that round differently.
                assert error(one, expected) < 2**-8


# --- features of the step --------------------------------------------------------------------


def test_clipping_skipping_and_unscaling():
    params, other, rest = matrices(), matrices(), matrices(1, shapes=REST)
    muon = onepass.Muon(both_groups(params, rest), 0.1, max_grad_norm=1.0, skip_nonfinite=True)
    plain = onepass.Muon(other, 0.1)
    set_grads(params + rest, torch.float32, 0)
    total = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in params + rest)).item()
    for p, q in zip(params, other, strict=True):
        q.grad = p.grad / total
    muon.step()
    plain.step()
    assert muon.grad_norm.item() == pytest.approx(total, rel=1e-6)
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    before = [p.detach().clone() for p in params + rest]
    buffer = muon.state[params[0]]["momentum_buffer"].clone()
    params[1].grad[0, 0] = math.inf
    muon.step()
    assert muon.skipped_steps == 1
    assert all(map(same_bits, before, params + rest))
    assert same_bits(buffer, muon.state[params[0]]["momentum_buffer"])
    scaler = onepass.GradScaler("cpu", init_scale=2.0**10)
    assert scaler.scale(torch.ones(())) == 2.0**10
    for q in other:
        q.grad = torch.randn(q.shape)
    again = clone(other)
    copied = onepass.Muon(again, 0.1)
    copied.load_state_dict(plain.state_dict())
    for p, q in zip(again, other, strict=True):
        p.grad = q.grad * 2.0**10
    plain.step()
    scaler.step(copied)
    for p, q in zip(again, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_telemetry_is_of_gradients_and_weights():
    params, rest = matrices(), matrices(1, shapes=REST)
    muon = onepass.Muon(both_groups(params, rest), 0.1, telemetry=True)
    set_grads(params + rest, torch.float32, 0)
    before = clone(params)
    muon.step()
    for owned, found in zip((params, rest), muon.telemetry, strict=True):
        grads = torch.cat([p.grad.flatten() for p in owned]).double().norm()
        weights = torch.cat([p.detach().flatten() for p in owned]).double().norm()
        torch.testing.assert_close(found["grad_norm"], grads)
        torch.testing.assert_close(found["weight_norm"], weights)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(params, before, strict=True)])
    torch.testing.assert_close(
        muon.telemetry[0]["update_norm"], moved.double().norm(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("budget", [True, 1 << 14])
def test_paged_states_have_the_same_bits(budget):
    results = []
    for paged in (False, onepass.paging.Paging(0 if budget is True else budget, 1 << 14)):
        params, rest = matrices(0, torch.bfloat16), matrices(1, torch.bfloat16, REST)
        options = {"weights": "split16", "ema_decay": 0.9, "max_grad_norm": 1.0}
        muon = onepass.Muon(both_groups(params, rest), 0.1, paged=paged, **options)
        for step in range(3):
            set_grads(params + rest, torch.bfloat16, step)
            muon.step()
        results.append([*params, *rest, *(muon.state[p]["ema"] for p in params + rest)])
    assert all(map(same_bits, *results))


class Failing(TorchProducts):
    """Products that run out of memory."""

    def product_plus(self, *args, **kwargs):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_failure_between_the_sweeps_stops_the_optimizer(backend):
    if BACKENDS[backend].unavailable(torch.device("cpu")):
        pytest.skip(f"no backend {backend}")
    params = matrices(shapes=[(8, 8)])
    muon = onepass.Muon(params, 0.1, backend=backend)
    set_grads(params, torch.float32, 0)
    muon.step()
    saved, weights = copy.deepcopy(muon.state_dict()), params[0].detach().clone()
    muon.products, muon._plan = Settings("fp32", 0, Failing()), None
    with pytest.raises(RuntimeError, match="out of memory"):
        muon.step()
    muon.products, muon._plan = Settings("fp32", 0, TorchProducts()), None
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        muon.step()
    muon.load_state_dict(saved)
    muon.step()
    assert not same_bits(params[0], weights)


def test_copies_and_pickles_keep_the_settings():
    params = matrices(shapes=[(8, 8)])
    muon = onepass.Muon(params, 0.1, precision="bf16", muon_scratch=12345)
    for made in (copy.deepcopy(muon), pickle.loads(pickle.dumps(muon))):
        assert (made.products.precision, made.products.scratch) == ("bf16", 12345)
        own = made.param_groups[0]["params"]
        set_grads(own, torch.float32, 0)
        made.step()


def test_the_predicted_scratch_is_allocated():
    """The memory profiler predicts the memory that a step keeps."""
    for options in ({}, {"precision": "bf16", "muon_scratch": 4096}):
        params, rest = matrices(), matrices(1, shapes=REST)
        muon = onepass.Muon(both_groups(params, rest), 0.1, **options)
        expected = predict(muon)
        set_grads(params + rest, torch.float32, 0)
        muon.step()
        assert expected.scratch == sum(t.nbytes for t in muon.scratch()) > 0
        held = [v for p in params for v in (muon.state[p]["momentum_buffer"],)]
        held += [muon.state[p][k] for p in rest for k in ("exp_avg", "exp_avg_sq")]
        assert 0 <= expected.moments - sum(t.nbytes for t in held) <= 64  # counters
