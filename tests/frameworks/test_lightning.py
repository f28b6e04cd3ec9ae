"""Lightning: ``16-mixed`` precision with ``gradient_clip_val``, and a resumed run."""

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from onepass.integrations.lightning import AveragedWeights

from . import parts


class Module(lightning.LightningModule):
    def __init__(self, cls, options):
        super().__init__()
        self.model = parts.small_model()
        self.make = lambda: cls(self.parameters(), lr=0.01, **options)

    def training_step(self, batch, index):
        return self.model(batch[0]).float().square().mean()

    def configure_optimizers(self):
        optimizer = self.make()
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)]


def fit(cls, options, path, epochs, scaled=True, resume=None, lose=None):
    module = Module(cls, options)
    if lose is not None:
        parts.losing(next(module.parameters()), at=lose)
    data = torch.utils.data.TensorDataset(torch.cat(parts.batches(4)))
    # precision="16-mixed" makes this plugin on a GPU; on a CPU, Lightning uses bf16 instead.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        plugins=plugins,
        gradient_clip_val=0.5,
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    return parts.weights(module), trainer


@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_mixed_precision_with_clipping(cls, options, tmp_path):
    found, trainer = fit(cls, options, tmp_path, 2, lose=2)
    assert all(weight.isfinite().all() for weight in found)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**9  # halved at the skipped step
    if not options.get("states"):
        twin = getattr(torch.optim, cls.__name__)
        theirs, _ = fit(twin, options, tmp_path, 2, lose=2)
        for one, other in zip(found, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(cls, options, tmp_path):
    whole, _ = fit(cls, options, tmp_path, 4)
    _, trainer = fit(cls, options, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(cls, options, tmp_path, 4, resume=tmp_path / "half.ckpt")
    assert parts.same(whole, resumed)


def test_the_fused_flag_is_refused_by_lightning_as_torchs_is(tmp_path):
    """Lightning cannot clip gradients for an optimizer that unscales them within the step."""
    for cls in (torch.optim.AdamW, parts.onepass.AdamW):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(cls, {"fused": True}, tmp_path, 1)


class Evaluated(Module):
    """Records the weights with which it is evaluated, and fails in one validation if asked to."""

    def __init__(self, options, failing=None):
        super().__init__(parts.onepass.AdamW, options)
        self.seen, self.failing = [], failing

    def validation_step(self, batch, index):
        self.seen.append(parts.weights(self.model))
        if len(self.seen) == self.failing:
            raise ArithmeticError

    test_step = validation_step


def evaluated(options, failing=None):
    module = Evaluated(options, failing)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat(parts.batches(2))), batch_size=8
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[AveragedWeights()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return module, trainer, data


def test_evaluations_see_the_averages():
    module, trainer, data = evaluated({"ema_decay": 0.5})
    start = parts.weights(module)
    trainer.fit(module, data, data)
    trainer.test(module, data, verbose=False)
    (optimizer,) = trainer.optimizers
    averages = [optimizer.state[p]["ema"] for p in module.parameters()]
    assert parts.same(module.seen[0], start)  # before the first step
    assert parts.same(module.seen[-1], averages)
    assert not parts.same(module.seen[1], module.seen[-1])
    assert not parts.same(parts.weights(module), averages)  # the weights of the training are back


def test_a_validation_that_raises_leaves_the_weights_of_the_training():
    module, trainer, data = evaluated({"ema_decay": 0.5}, failing=2)
    # enable_grad: after an error, Lightning leaves gradients disabled.
    with torch.enable_grad(), pytest.raises(ArithmeticError):
        trainer.fit(module, data, data)
    (optimizer,) = trainer.optimizers
    optimizer.check_swapped()  # raises while the averages are in place
    assert not parts.same(parts.weights(module), module.seen[-1])


def test_an_optimizer_without_averages_is_an_error():
    module, trainer, data = evaluated({})
    with pytest.raises(ValueError, match="ema_decay"):
        trainer.fit(module, data, data)
