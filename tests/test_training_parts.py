"""Parts of training: groups without weight decay, and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import onepass
from onepass.training import SCHEDULES, Trainer, decay_groups, schedule
from tests.training_case import model


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small for a second thread."""
    torch.set_num_threads(1)


# --- groups ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Parameters that a choice by name alone, or by shape alone, would misclassify."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.plane = nn.LayerNorm((4, 4))  # the weight of a norm, with two dimensions
        self.scale = nn.Parameter(torch.ones(4))  # the scale of a custom norm
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # bias_k has 3 dimensions
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_groups_go_by_type_shape_and_name():
    odd = Odd()
    names = {p: name for name, p in odd.named_parameters()}
    decayed, plain = decay_groups(odd, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [names[p] for p in decayed["params"]] == [
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    both = [names[p] for p in (*decayed["params"], *plain["params"])]
    assert sorted(both) == sorted(n for n in names.values() if not n.startswith("frozen"))
    torch.optim.AdamW([decayed, plain])  # the groups have no keys that torch.optim rejects


def test_groups_take_types_and_names():
    plain = decay_groups(Odd(), no_decay=(nn.Embedding, "attention.in_proj_weight"))[1]
    shapes = [tuple(p.shape) for p in plain["params"]]
    assert (8, 4) in shapes  # tied to the head, which is a Linear
    assert (12, 4) in shapes
    with pytest.raises(ValueError, match="no_decay names 'hed'"):
        decay_groups(Odd(), no_decay=("hed",))


def test_groups_with_formats_split_those_of_parameter_groups():
    odd = Odd()
    groups = decay_groups(odd, 0.1, fp32_states=(*onepass.EMBEDDINGS, *onepass.NORMS))
    names = {p: name for name, p in odd.named_parameters()}
    found = {names[p]: g for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    assert {n for n, g in found.items() if g["weight_decay"]} == {
        names[p] for p in decay_groups(odd)[0]["params"]
    }
    wide = {n for n, g in found.items() if g.get("states") == "fp32"}
    assert wide == {"embedding.weight", "plane.weight", "plane.bias"}


def test_a_model_without_trainable_parameters_is_an_error():
    for nothing in (nn.ReLU(), model().requires_grad_(False)):
        with pytest.raises(ValueError, match="needs a parameter that requires a gradient"):
            Trainer(nothing)


# --- schedules -------------------------------------------------------------------------------


def rates(steps, lr=0.5, **options):
    optimizer = onepass.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_rate(name):
    found = rates(12, name=name, warmup_steps=9, total_steps=100)
    assert found[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])


def test_warm_restarts_match_torch():
    found = rates(40, name="warm_restarts", restart_steps=5, restart_factor=2, final=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    twin = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, 2, 0.05)
    for rate in found:
        assert rate == optimizer.param_groups[0]["lr"]
        optimizer.step()
        twin.step()
    assert [step for step, rate in enumerate(found) if rate == 0.5] == [0, 5, 15, 35]


def test_cosine_and_wsd_end_where_they_say_and_stay():
    for name in ("cosine", "wsd"):
        found = rates(60, name=name, warmup_steps=10, total_steps=50, final=0.2)
        assert found[50:] == pytest.approx([0.1] * 10)
    assert found[10:40] == [0.5] * 30
    assert found[45] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, r"one of warm_restarts, .*'cosin'; did you mean 'cosine'\?"),
        ({"name": "cosine"}, "needs total_steps above"),
        (
            {"name": "wsd", "total_steps": 10, "decay_steps": 11},
            r"must be in \[1, 10\]",
        ),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"final": 2}, r"final must be in \[0, 1\]"),
    ],
)
def test_a_wrong_schedule_says_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)
