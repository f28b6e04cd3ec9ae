"""onepass.integrations without the frameworks; tests/frameworks has the tests with them."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import onepass
from onepass.integrations.transformers import optimizer_cls_and_kwargs

ARGUMENTS = SimpleNamespace(
    learning_rate=3e-4, weight_decay=0.2, adam_beta1=0.85, adam_beta2=0.95, adam_epsilon=1e-6
)
"""The fields of transformers.TrainingArguments that the helper reads."""


@pytest.mark.parametrize(
    ("kind", "betas", "eps"),
    [
        (onepass.AdamW, (0.85, 0.95), 1e-6),
        (onepass.AdEMAMix8bit, (0.85, 0.95, 0.9999), 1e-6),
        (onepass.Lion, (0.85, 0.95), None),
        (onepass.RMSprop, None, 1e-8),  # adam_epsilon is not its eps
        (onepass.SGD, None, None),
    ],
)
def test_settings_of_training_arguments(kind, betas, eps):
    cls, options = optimizer_cls_and_kwargs(ARGUMENTS, kind)
    made = cls([torch.nn.Parameter(torch.zeros(4))], **options)
    group = made.param_groups[0]
    assert type(made) is kind
    assert group["lr"] == 3e-4
    assert group["weight_decay"] == 0.2
    assert group.get("betas") == betas
    assert group.get("eps") == eps


def test_options_replace_the_settings_of_training_arguments():
    _, options = optimizer_cls_and_kwargs(ARGUMENTS, lr=1.0, states="mx8")
    assert options["lr"] == 1.0
    assert options["states"] == "mx8"
    assert options["betas"] == (0.85, 0.95)


@pytest.mark.parametrize("wrong", [torch.optim.AdamW, "AdamW", None])
def test_another_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match="optimizer class of onepass"):
        optimizer_cls_and_kwargs(ARGUMENTS, wrong)


@pytest.mark.parametrize("name", ["lightning", "timm", "torchtitan"])
def test_a_missing_framework_is_named(name, monkeypatch):
    for module in (name, "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"onepass.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"pip install {name}$"):
        importlib.import_module(f"onepass.integrations.{name}")
