"""onepass under DeepSpeed's engine: every ZeRO stage on two gloo ranks, with a resumed run."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist

import onepass
from tests import zero_ranks

STEPS = 6
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def _train(engine, steps):
    """Trains on the batches of some steps; the data depend on the step and the rank."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(4, 64, generator=generator)
        loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def _weights(model):
    """Copies of the weights that this rank holds; in stage 3, those are parts."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]


def every_stage_trains_and_resumes(directory):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    losses = []
    for stage in (0, 1, 2, 3):
        for states in ("fp32", "mx8"):
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
            )
            optimizer = onepass.AdamW(model.parameters(), lr=1e-2, states=states)
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config={**CONFIG, "zero_optimization": {"stage": stage}},
            )
            first = _train(engine, range(3))
            saved = str(directory / f"{stage}-{states}")
            engine.save_checkpoint(saved)
            losses.append([*first, *_train(engine, range(3, STEPS))])
            expected = _weights(model)
            assert all(w.numel() for w in expected)
            engine.load_checkpoint(saved)
            _train(engine, range(3, STEPS))
            assert all(map(torch.equal, _weights(model), expected)), (stage, states)
    # Stages divide the same training among ranks; 8-bit states change it little.
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=0.01)


def test_deepspeed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    check = every_stage_trains_and_resumes
    monkeypatch.setattr(zero_ranks, "PATIENCE", 600)  # DeepSpeed compiles its collectives first
    found = zero_ranks.run(2, [check], tmp_path)
    assert found[check.__name__] is None, found[check.__name__]
