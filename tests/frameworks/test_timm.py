"""timm: create_optimizer_v2 finds the classes of onepass by name."""

import pytest

import onepass

timm = pytest.importorskip("timm", reason="timm needs a torchvision built for the same torch")


@pytest.mark.parametrize(
    "kind", [onepass.AdamW, onepass.AdamW8bit, onepass.AdEMAMix, onepass.Lion, onepass.SGD]
)
def test_the_class_is_the_one_of_onepass(kind):
    from timm.optim import create_optimizer_v2

    from onepass.integrations.timm import register

    assert register() == register()  # a second call changes nothing
    name = f"onepass-{kind.__name__.lower()}"
    assert name in timm.optim.list_optimizers()
    model = timm.create_model("resnet10t", num_classes=10)
    made = create_optimizer_v2(model, opt=name, lr=0.25, weight_decay=0.05, momentum=0.8, eps=1e-7)
    assert type(made) is kind
    plain, decayed = made.param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    assert {group["lr"] for group in made.param_groups} == {0.25}
    assert decayed.get("momentum", 0.8) == 0.8
    assert decayed.get("eps", 1e-7) == 1e-7
