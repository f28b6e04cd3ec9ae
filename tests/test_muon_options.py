"""Muon: options, groups and parameters that are refused, and the groups of muon_groups."""

from __future__ import annotations

import math

import pytest
import torch

import onepass

from .muon_cases import matrices

# --- refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -1}, "momentum must be"),
        ({"nesterov": "yes"}, "nesterov must be"),
        ({"ns_steps": 100}, "ns_steps must be at most 99"),
        ({"ns_steps": 2.5}, "ns_steps must be a whole number"),
        ({"ns_coefficients": (1, 2)}, "ns_coefficients must be 3 numbers"),
        ({"ns_coefficients": "polar"}, "ns_coefficients must be one of"),
        ({"ns_coefficients": []}, "ns_coefficients must be a triple"),
        ({"ns_coefficients": [(1, 2, math.nan)]}, "a coefficient of ns_coefficients"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be one of"),
        ({"eps": math.inf}, "eps must be"),
        ({"states": "mx8"}, "not for Muon's momentum"),
        ({"states": "mx4"}, "not for Muon's momentum"),
        ({"decoupled_weight_decay": False}, "decoupled_weight_decay must be True"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"muon_scratch": "many"}, "muon_scratch must be"),
        ({"muon_scratch": -1}, "muon_scratch must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        onepass.Muon(matrices(shapes=[(4, 4)]), **options)


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((5,), {}, "use_muon=False"),
        ((), {}, "use_muon=False"),
        ((6, 4), {"split": (4, 0)}, "4 does not divide 6"),
        ((6, 4), {"split": (2, 2)}, "a dimension that parameter 0"),
        ((6, 4), {"split": 3}, "split must be"),
        ((6, 4), {"split": (0, 0)}, "at least one part"),
        ((2, 6, 4), {"split": (2, 0)}, "counts matrices"),
        ((6, 4), {"flatten": "yes"}, "flatten must be"),
        ((6, 4), {"betas": (0.9, 0.99)}, "needs use_muon=False"),
        ((6, 4), {"use_muon": "no"}, "use_muon must be"),
        ((6, 4), {"use_muon": False, "momentum": 0.9}, "an option of Muon"),
        ((6, 4), {"use_muon": False, "betas": 0.9}, "betas must be"),
        ((6, 4), {"use_mun": False}, "did you mean 'use_muon'"),
    ],
)
def test_wrong_groups_are_refused(shape, group, message):
    muon = onepass.Muon(matrices(shapes=[(4, 4)]))
    with pytest.raises(ValueError, match=message):
        muon.add_param_group({"params": matrices(shapes=[shape]), **group})
    assert len(muon.param_groups) == 1


def test_gradient_release_is_refused():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="does not support Muon"):
        onepass.release_gradients(model, onepass.Muon(onepass.muon_groups(model)))


# --- muon_groups -----------------------------------------------------------------------------


def test_muon_groups():
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 8),
        torch.nn.Conv1d(8, 8, 3),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 8),
        torch.nn.Linear(8, 10),
    )
    groups = onepass.muon_groups(model, 0.02, 3e-4, weight_decay=0.0)
    names = {p: name for name, p in model.named_parameters()}
    listed = [[names[p] for p in group["params"]] for group in groups]
    assert listed[:2] == [["2.weight", "4.weight"], ["1.weight"]]
    rest = {"0.weight", "1.bias", "2.bias", "3.weight", "3.bias", "4.bias", "5.weight", "5.bias"}
    assert {*listed[2]} == rest
    assert [group["lr"] for group in groups] == [0.02, 0.02, 3e-4]
    assert [g.get("flatten", False) for g in groups] == [False, True, False]
    assert [g.get("use_muon", True) for g in groups] == [True, True, False]
    onepass.Muon(groups)
    tied = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert [g.get("use_muon", True) for g in onepass.muon_groups(tied)] == [False]
    with pytest.raises(ValueError, match="names 'missing'"):
        onepass.muon_groups(model, adamw=("missing",))
