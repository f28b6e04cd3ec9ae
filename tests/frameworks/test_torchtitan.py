"""onepass in torchtitan's OptimizersContainer.

The container passes ``fused`` and ``foreach`` to every optimizer in the groups, makes the states by
a step with zero gradients, and saves flat state dicts.
"""

import pytest
import torch.distributed.checkpoint as dcp
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import onepass
from onepass.integrations.torchtitan import OnepassOptimizersContainer

from . import parts


def container(model, implementation, options):
    groups = [
        ParamGroupConfig(
            pattern=r"bias$",
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": 0.01, "weight_decay": 0.0, **options},
        ),
        ParamGroupConfig(
            pattern=r"^0\.", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01, **options}
        ),
        ParamGroupConfig(
            pattern=r".*", optimizer_name="Lion", optimizer_kwargs={"lr": 0.001, **options}
        ),
    ]
    config = OnepassOptimizersContainer.Config(param_groups=groups, implementation=implementation)
    return config.build(model_parts=[model])


def train(model, optimizer, data):
    for batch in data:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("states", ["fp32", "mx8", "mx4"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(implementation, states, tmp_path):
    options = {} if states == "fp32" else {"states": states}
    data = parts.batches(6)
    model = parts.small_model()
    optimizer = container(model, implementation, options)
    train(model, optimizer, data[:3])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=str(tmp_path))
    train(model, optimizer, data[3:])

    other = parts.small_model(seed=5)
    loading = container(other, implementation, options)
    wanted = {"model": other.state_dict(), "optimizer": loading.state_dict()}
    dcp.load(wanted, checkpoint_id=str(tmp_path))
    other.load_state_dict(wanted["model"])
    loading.load_state_dict(wanted["optimizer"])
    train(other, loading, data[3:])
    assert parts.same(parts.weights(model), parts.weights(other))


def test_names_are_those_of_onepass_first():
    resolve = OnepassOptimizersContainer._resolve_optimizer_factory
    assert resolve("AdamW8bit") is onepass.AdamW8bit
    assert resolve("AdamW") is onepass.AdamW
    assert resolve("DistMuon") is OptimizersContainer._resolve_optimizer_factory("DistMuon")
    with pytest.raises(NotImplementedError, match="Adamw"):
        resolve("Adamw")
    made = container(parts.small_model(), "fused", {})
    assert {type(optimizer) for optimizer in made} == {onepass.AdamW, onepass.Lion}
