"""cautious_weight_decay: its mask, its errors, and where the option is stored.

The backend suite runs it in every format (the variants of tests/cases.py), and
tests/test_precision.py against the formula in float64.
"""

from __future__ import annotations

import pytest
import torch

import onepass

from .cases import make_params, runs_here, same_bits, set_grads, train

CLASSES = [onepass.AdamW, onepass.Lion, onepass.NAdam, onepass.SGD]
ON = {"cautious_weight_decay": True, "decoupled_weight_decay": True}
SIGNS = [(w, g) for w in (1.0, -1.0, 0.0) for g in (1.0, -1.0, 0.0)]


def stepped(cls, weights, grads, backend="reference", **options):
    param = torch.nn.Parameter(torch.tensor(weights))
    param.grad = torch.tensor(grads)
    cls([param], backend=backend, **options).step()
    return param.detach()


@pytest.mark.parametrize("backend", runs_here())
@pytest.mark.parametrize("cls", CLASSES)
def test_a_weight_decays_only_if_the_update_does_not_move_it_away_from_0(cls, backend):
    """The mask of the paper is update * weight >= 0, so a weight without an update decays."""
    weights, grads = map(list, zip(*SIGNS, strict=True))
    decay = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True}
    plain = stepped(cls, weights, grads, backend, **decay | {"weight_decay": 0.0})
    always = stepped(cls, weights, grads, backend, **decay)
    found = stepped(cls, weights, grads, backend, **decay, cautious_weight_decay=True)
    for i, (weight, grad) in enumerate(SIGNS):
        # The first update has the sign of the gradient.
        assert found[i] == (always if weight * grad >= 0 else plain)[i], (weight, grad)
    assert (found != always).sum() == (found != plain).sum() - 2 == 2


@pytest.mark.parametrize("backend", runs_here())
def test_signs_count_also_where_their_product_underflows(backend):
    tiny = 1e-23  # its square is 0 in fp32
    options = {"lr": tiny, "weight_decay": 0.1 / tiny}
    found = stepped(onepass.Lion, [-tiny, tiny], [1.0, 1.0], backend, **ON, **options)
    assert found[0] == pytest.approx(-2 * tiny, rel=1e-6)  # without decay
    assert found[1] == pytest.approx(-0.1 * tiny, rel=1e-5)  # with decay


@pytest.mark.parametrize("cls", [onepass.Adam, *CLASSES])
def test_coupled_decay_cannot_be_cautious(cls):
    params = make_params([(3,)], torch.float32, 1)
    options = {"cautious_weight_decay": True, "decoupled_weight_decay": False}
    with pytest.raises(ValueError, match="needs decoupled_weight_decay=True"):
        cls(params, **options)
    optimizer = cls(params, **ON)
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    params[0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="needs decoupled_weight_decay=True"):
        optimizer.step()


def test_other_optimizers_refuse_it():
    params = make_params([(3,)], torch.float32, 1)
    with pytest.raises(TypeError, match="no keyword 'cautious_weight_decay'"):
        onepass.Adagrad(params, cautious_weight_decay=True)
    with pytest.raises(ValueError, match="Adagrad has no option 'cautious_weight_decay'"):
        onepass.Adagrad([{"params": params, "cautious_weight_decay": True}])
    with pytest.raises(ValueError, match="AdamW has no option 'eps_in_sqrt'"):
        onepass.AdamW([{"params": params, "eps_in_sqrt": True}])
    with pytest.raises(ValueError, match="cautious_weight_decay must be True or False"):
        onepass.AdamW(params, cautious_weight_decay="yes")


def test_a_group_can_have_it_and_it_is_saved():
    first, second = ([p] for p in make_params([(50,), (50,)], torch.float32, 1))
    groups = [{"params": first}, {"params": second, "cautious_weight_decay": True}]
    optimizer = onepass.AdamW(groups, lr=0.1, weight_decay=0.5)
    params = [*first, *second]
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    apart = [onepass.AdamW([p], lr=0.1, weight_decay=0.5) for p in expected]
    apart[1].param_groups[0]["cautious_weight_decay"] = True
    for step in range(2):
        set_grads(params, torch.float32, step)
        for p, q in zip(params, expected, strict=True):
            q.grad = p.grad
        for one in (optimizer, *apart):
            one.step()
    assert all(map(same_bits, params, expected))
    saved = optimizer.state_dict()["param_groups"]
    assert "cautious_weight_decay" not in saved[0]  # as in torch.optim
    assert saved[1]["cautious_weight_decay"] is True


def test_bitsandbytes_does_not_have_it():
    params = make_params([(64,)], torch.float32, 1)
    optimizer = onepass.AdamW(params, **ON, states="dynamic8")
    train(optimizer, params, 1)
    with pytest.raises(ValueError, match="cautious_weight_decay"):
        onepass.to_bitsandbytes(optimizer)
