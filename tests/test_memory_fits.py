"""`onepass.memory.fits`: models, optimizers, GPUs and samples."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.memory import Sample, fits
from onepass.memory.gpus import GPUS, capacity
from onepass.memory.models import known
from onepass.memory.scenarios import Terms, candidate, predicted
from onepass.memory.shards import Mesh


def test_the_result_is_that_of_the_command():
    fit = fits("gpt2", "adamw8bit", device="24GB", mesh="fsdp=8")
    terms = Terms(device="cuda", mesh=Mesh(fsdp=8))
    found = predicted(candidate("adamw8bit"), known("gpt2"), terms)
    assert fit.fits
    assert fit.peak == found.peak == sum(fit.breakdown.values())
    assert fit.capacity == 24 * 10**9
    assert "gathered" in fit.breakdown
    text = fit.explain()
    assert text.startswith("gpt2 with adamw8bit on 8 GPUs (fsdp=8): ")
    assert "not counted: activations" in text
    over = fits("gpt2", "adamw", device="1GB")
    assert not over.fits
    assert "of 1.00 GB; does not fit: 493 MB over" in over.explain()


def test_a_name_a_class_an_instance_and_a_function_agree():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7))
    instance = onepass.AdamW(model.parameters(), states="mx8")
    results = [
        fits(model, given, device="1GB")
        for given in (
            "adamw+mx8",
            onepass.AdamW8bit,
            instance,
            lambda params: onepass.AdamW(params, states="mx8"),
        )
    ]
    assert len({fit.peak for fit in results}) == 1
    assert results[0].breakdown["weights"] >= 4 * 61_607  # the dtype of the module, fp32
    assert not instance.state
    # An instance also serves another model; torch's optimizers are simulated.
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    assert fits("bert-base", other).breakdown["moments"] == pytest.approx(2 * 109_482_240, rel=0.01)


def test_a_sample_adds_activations():
    model = ("gpt2", "adamw+split16")
    bare = fits(*model)
    long, short, eager = (
        fits(*model, sample=Sample(8, 1024, checkpointing, attention)).peak
        for checkpointing, attention in ((False, "sdpa"), (True, "sdpa"), (False, "eager"))
    )
    assert bare.peak < short < long < eager
    assert fits(*model, sample=(8, 1024)).peak == long
    # 12 blocks of 2 layer norms, attention (q, k, v and output), GELU in parts; the final norm and
    # the loss. Gradients replace activations one to one.
    tokens, width = 8 * 1024, 768
    block = 2 * tokens * (2 * 2 * width + 4 * width + 5 * 4 * width) + 4 * tokens * 12
    whole = 12 * block + 4 * tokens * width + 12 * tokens * 50257
    gradients = 2 * 124_439_808
    assert long - bare.peak == pytest.approx(whole - gradients, rel=0.001)
    assert fits("bert-base", "adamw", sample=(1, 1)).counts_activations


def test_gpus_by_name_and_size():
    assert capacity("h100") == capacity("H100") == 80 * 10**9
    assert capacity("RTX 4090") == capacity("24GB") == 24 * 10**9
    assert capacity("24GiB") == 24 << 30
    assert {"H100", "H200", "A100", "RTX4090", "MI300X"} <= GPUS.keys()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "24"}, "a name or a size with a unit; got 24: write 24GB"),
        ({"device": 80}, "write 80GB"),
        ({"device": "H10"}, "did you mean 'H100'"),
        ({"device": "24GX"}, "no GPU '24GX'"),
        ({"mesh": "tp=2"}, "tp needs the plan"),
        ({"mesh": {"fsdp": 0}}, "whole number of at least 1"),
        ({"sample": (0, 8)}, "batch must be an integer of at least 1; got 0"),
        ({"sample": (1, 8.0)}, "sequence must be an integer"),
        ({"model_or_config": "resnet-50", "sample": (1, 1)}, "cannot be predicted"),
        ({"model_or_config": "mixtral-8x7b", "sample": (1, 1)}, "without experts"),
        ({"model_or_config": 3}, "model_or_config must be a name.*got a int"),
        ({"model_or_config": torch.nn.ReLU()}, "must have parameters"),
        ({"model_or_config": "gpt3"}, "did you mean 'gpt2'"),
        ({"optimizer": 3}, "optimizer must be a name.*got a int"),
        ({"optimizer": "adamx"}, "no optimizer 'adamx'"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    given = {"model_or_config": "gpt2", "optimizer": "adamw", **arguments}
    with pytest.raises(ValueError, match=says):
        fits(given.pop("model_or_config"), given.pop("optimizer"), **given)


def test_an_optimizer_with_several_groups_is_refused():
    model = torch.nn.Linear(3, 3)
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(ValueError, match=r"one parameter group .* got 2"):
        fits(model, onepass.AdamW(groups))


def test_attention_must_be_known():
    with pytest.raises(ValueError, match="attention must be one of sdpa, eager; got 'flash'"):
        Sample(1, 1, attention="flash")
